"""Tokens from shapes and shapes from tokens; where the tokenizer finds its model; what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pipeline_shapes import MODEL_ARGS, small_model

from trellis.models.autoencoders.split_decode import PartSizes, parts_within
from trellis.pipelines import checkpoints
from trellis.pipelines.token_files import load_tokens, save_tokens
from trellis.pipelines.tokenizer import SparseSDFTokenizer, model_hash, resolve_device, to_float16
from trellis.trainers.checkpoint import save_checkpoint
from trellis.utils.blocks import SparseSDFBlocks
from trellis.utils.io_utils import save_sparse_sdf


def bias_of(tokenizer: SparseSDFTokenizer) -> float:
    return tokenizer.model.decoder.out_layer.bias.item()


def test_tokens_of_a_shape(tokenizer, blocks):
    tokens = tokenizer.encode(blocks, sha256="ab" * 32)
    assert tokens.ids.dtype == np.int32 and tokens.ids.shape == (blocks.num_blocks,)
    assert len(np.unique(tokens.ids)) > 3
    np.testing.assert_array_equal(tokens.block_index, blocks.block_index)
    np.testing.assert_array_equal(tokens.to_world, blocks.to_world)
    assert (tokens.resolution, tokens.band_voxels, tokens.label, tokens.codebook_size) == (32, 4, "organ", 32)
    assert tokens.model_hash == tokenizer.model_hash and len(tokens.model_hash) == 64


def test_decoding_from_file_equals_decoding_from_memory(tokenizer, blocks, tmp_path):
    tokens = tokenizer.encode(blocks)
    path = tmp_path / "shape.safetensors"
    save_tokens(path, tokens)
    memory, file = tokenizer.decode(tokens), tokenizer.decode(path)
    assert memory.block_sdf.dtype == np.float16
    np.testing.assert_array_equal(file.block_sdf.view(np.uint16), memory.block_sdf.view(np.uint16))
    vertices, faces = tokenizer.decode_mesh(tokens)
    from_file = tokenizer.decode_mesh(path)
    np.testing.assert_array_equal(from_file[0], vertices)
    np.testing.assert_array_equal(from_file[1], faces)
    assert len(faces) > 0


def test_decoded_values_stand_where_the_network_put_them(tokenizer, blocks):
    """Against the model's voxel list with explicit coordinates: a wrong order inside the block would show."""
    tokens = tokenizer.encode(blocks)
    coords = torch.zeros(len(tokens.ids), 4, dtype=torch.int32)
    coords[:, 1:] = torch.from_numpy(tokens.block_index.astype(np.int32))
    with torch.no_grad():
        sdf, voxels = tokenizer.model.decode_ids(torch.from_numpy(tokens.ids).long(), coords)
    decoded = tokenizer.decode(tokens)
    dense = np.full((32, 32, 32), np.nan, dtype=np.float32)
    for row, block in enumerate(decoded.block_index.astype(int) * 8):
        x, y, z = block
        dense[x : x + 8, y : y + 8, z : z + 8] = decoded.block_sdf[row]
    got = dense[tuple(voxels[:, 1:].numpy().T)]
    np.testing.assert_allclose(got, sdf[:, 0].numpy(), atol=1e-3)
    assert np.unique(got).size > 1000


def test_batch_of_one_equals_the_model_on_a_batch(tokenizer, blocks):
    from trellis.datasets.sparse_sdf import collate, sample_from_blocks
    from trellis.pipelines.tokenizer import move_batch

    batch = collate([sample_from_blocks(blocks), sample_from_blocks(blocks)])
    with torch.no_grad():
        ids = tokenizer.model.encode(move_batch(batch, torch.device("cpu")))["ids"].numpy()
    expected = tokenizer.encode_blocks(blocks)
    np.testing.assert_array_equal(ids, np.concatenate([expected, expected]))


def test_prepared_file_and_blocks_give_the_same_tokens(tokenizer, blocks, tmp_path):
    path = tmp_path / "shape_r32.npz"
    save_sparse_sdf(path, blocks)
    np.testing.assert_array_equal(tokenizer.encode(path).ids, tokenizer.encode(blocks).ids)
    with pytest.raises(ValueError, match="resolution 64 was asked for.*32"):
        tokenizer.encode(path, resolution=64)


def test_mesh_in_memory_and_from_file(tokenizer, tmp_path):
    """A mesh goes in in RAS mm and the tokens know where it was; a file says its space or is taken as told."""
    from trellis.utils.mesh_utils import write_mesh

    corners = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], dtype=float)
    vertices = corners * [40, 20, 10] + [100, -50, 7]
    quads = np.array([[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]])
    faces = np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]])
    tokens = tokenizer.encode((vertices, faces), label="box")
    np.testing.assert_allclose(tokens.to_world[:3, 3], [120, -40, 12])
    assert tokens.resolution == 32 and tokens.label == "box"
    path = tmp_path / "box.stl"
    write_mesh(path, vertices, faces, mesh_space="LPS")
    again = tokenizer.encode(path)
    np.testing.assert_allclose(again.to_world, tokens.to_world, atol=1e-4)
    np.testing.assert_array_equal(again.block_index, tokens.block_index)
    untold = SparseSDFTokenizer(tokenizer.model)
    with pytest.raises(ValueError, match="resolution must be given"):
        untold.encode((vertices, faces))


def test_another_models_tokens_are_refused(tokenizer, model, blocks, tmp_path):
    tokens = tokenizer.encode(blocks)
    changed = type(model)(**model.config)
    changed.load_state_dict(model.state_dict())
    assert model_hash(changed) == tokenizer.model_hash
    with torch.no_grad():
        changed.decoder.out_layer.bias += 1e-3
    other = SparseSDFTokenizer(changed)
    path = tmp_path / "shape.safetensors"
    save_tokens(path, tokens)
    with pytest.raises(ValueError, match="another model"):
        other.decode(tokens)
    with pytest.raises(ValueError, match="shape.safetensors: .*another model"):
        other.decode(path)


def test_hash_names_decoder_and_codebook_and_not_the_encoder(model):
    twin = type(model)(**model.config)
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        twin.encoder.out_layer.bias += 1
        twin.quantizer.unused_steps += 5
    assert model_hash(twin) == model_hash(model)
    with torch.no_grad():
        twin.quantizer.codebook[3, 1] += 1e-6
    assert model_hash(twin) != model_hash(model)


def test_shape_without_blocks_is_refused(tokenizer, blocks):
    empty = SparseSDFBlocks(blocks.block_index[:0], blocks.block_sdf[:0], blocks.to_world, 32)
    with pytest.raises(ValueError, match="without blocks"):
        tokenizer.encode(empty)


@pytest.mark.parametrize(
    ("dtype", "words"),
    [
        (torch.float16, "made in float16, are not finite.*compute_dtype=torch.float32 or torch.bfloat16.*--device cpu"),
        (torch.float32, "made in float32, are not finite.*the weights or the field are not usable"),
    ],
)
def test_latents_that_are_not_finite_are_no_tokens(tokenizer, blocks, monkeypatch, dtype, words):
    real = tokenizer.model.encode

    def encode(batch):
        found = real(batch)
        found["mean"][1, 2] = torch.inf
        found["mean"][2] = torch.nan
        return found

    monkeypatch.setattr(tokenizer.model, "encode", encode)
    monkeypatch.setattr(type(tokenizer.model), "compute_dtype", dtype)
    with pytest.raises(ValueError, match=f"the latents of 2 of {blocks.num_blocks} blocks, {words}"):
        tokenizer.encode(blocks)


def test_rounding_keeps_the_side():
    values = torch.tensor([-1e-9, 1e-9, 0.0, -0.5, 0.99999, -1e-4])
    half = to_float16(values)
    assert ((half < 0) == (values < 0)).all() and half.dtype == torch.float16
    assert torch.equal(half[3:], values[3:].half())


# Where the model comes from


def test_run_folder_gives_newest_averaged_weights(run_folder):
    tokenizer = SparseSDFTokenizer.from_pretrained(run_folder, device="cpu")
    assert bias_of(tokenizer) == pytest.approx(-0.04) and tokenizer.resolution == 32
    assert bias_of(SparseSDFTokenizer.from_pretrained(run_folder, device="cpu", ema=False)) == pytest.approx(0.04)
    assert bias_of(SparseSDFTokenizer.from_pretrained(run_folder / "ckpts", device="cpu")) == pytest.approx(-0.04)


def test_damaged_newest_checkpoint_is_passed_over(run_folder, caplog):
    weights = run_folder / "ckpts" / "vqvae_ema0.99_step0000040.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    tokenizer = SparseSDFTokenizer.from_pretrained(run_folder, device="cpu")
    assert bias_of(tokenizer) == pytest.approx(-0.02)
    assert "step0000040" in caplog.text


def test_files_of_a_run(run_folder):
    ckpts = run_folder / "ckpts"
    for name, bias in (
        ("vqvae_step0000020.safetensors", 0.02),
        ("vqvae_ema0.99_step0000020.safetensors", -0.02),
        ("step0000020.json", -0.02),
    ):
        assert bias_of(SparseSDFTokenizer.from_pretrained(ckpts / name, device="cpu")) == pytest.approx(bias)


def test_published_folder_round_trip(tokenizer, blocks, tmp_path):
    tokenizer.save_pretrained(tmp_path / "published")
    again = SparseSDFTokenizer.from_pretrained(tmp_path / "published", device="cpu")
    assert again.model_hash == tokenizer.model_hash and again.resolution == 32
    np.testing.assert_array_equal(again.encode(blocks).ids, tokenizer.encode(blocks).ids)
    single = SparseSDFTokenizer.from_pretrained(tmp_path / "published" / "model.safetensors", device="cpu")
    assert single.model_hash == tokenizer.model_hash


def test_what_is_no_checkpoint(run_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    for source, words in (
        (tmp_path / "empty", "not a checkpoint"),
        (tmp_path / "missing", "no such checkpoint"),
        (tmp_path / "notes.txt", "must be .safetensors"),
    ):
        with pytest.raises(ValueError, match=words):
            SparseSDFTokenizer.from_pretrained(source, device="cpu")
    for manifest in (run_folder / "ckpts").glob("step*.json"):
        manifest.unlink()
    with pytest.raises(ValueError, match="no valid checkpoint"):
        SparseSDFTokenizer.from_pretrained(run_folder, device="cpu")


def test_config_that_does_not_fit_its_weights(run_folder):
    path = run_folder / "config.json"
    config = json.loads(path.read_text())
    config["models"]["vqvae"]["args"]["num_embeddings"] = 33
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"quantizer.codebook is \[32, 8\] and should be \[33, 8\]"):
        SparseSDFTokenizer.from_pretrained(run_folder, device="cpu")
    config["models"]["vqvae"]["args"] = {"model_chanels": 64}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="model_chanels"):
        SparseSDFTokenizer.from_pretrained(run_folder, device="cpu")
    path.unlink()
    with pytest.raises(ValueError, match="config.json"):
        SparseSDFTokenizer.from_pretrained(run_folder, device="cpu")


def write_own(run_folder: Path, model, metadata: dict) -> Path:
    """A third checkpoint, whose weights files say what they are."""
    weights = dict(model.state_dict())
    return save_checkpoint(run_folder / "ckpts", "vqvae", 60, weights, {0.99: weights}, {"step": 60}, metadata)


def test_weights_that_say_their_own_arguments_are_read_by_these(run_folder, model, blocks):
    """A later start with another config rewrites config.json; what the weights mean stays."""
    write_own(run_folder, model, {"class": "SparseSDFVQVAE", "args": MODEL_ARGS, "model": "vqvae"})
    path = run_folder / "config.json"
    config = json.loads(path.read_text())
    expected = SparseSDFTokenizer(model, resolution=32).encode(blocks).ids
    changed = {"name": "SparseSDFVQVAE", "args": {**MODEL_ARGS, "window_size": 2}}
    for models in ({"vqvae": changed}, {"other": changed}):
        path.write_text(json.dumps({**config, "models": models}))
        for source in (run_folder, run_folder / "ckpts" / "vqvae_step0000060.safetensors"):
            found = checkpoints.find_model(source)
            assert found.args == MODEL_ARGS and found.resolution == 32
            tokenizer = SparseSDFTokenizer.from_pretrained(source, device="cpu")
            np.testing.assert_array_equal(tokenizer.encode(blocks).ids, expected)


def test_what_weights_say_of_themselves(run_folder, model):
    own = {"class": "SparseSDFVQVAE", "args": MODEL_ARGS}
    write_own(run_folder, model, {**own, "resolution": 64})
    assert checkpoints.find_model(run_folder).resolution == 64
    write_own(run_folder, model, {**own, "class": "Other"})
    with pytest.raises(ValueError, match="class in its metadata must be SparseSDFVQVAE, got 'Other'"):
        checkpoints.find_model(run_folder)
    write_own(run_folder, model, {"args": 3})
    assert checkpoints.find_model(run_folder).args == MODEL_ARGS  # of config.json
    (run_folder / "config.json").unlink()
    write_own(run_folder, model, own)
    with pytest.raises(ValueError, match="config.json: no such file"):
        checkpoints.find_model(run_folder)


def test_hub_is_asked_only_for_what_is_no_path(monkeypatch, tokenizer, tmp_path):
    import huggingface_hub

    asked = []

    def download(hub_id, **kwargs):
        asked.append(hub_id)
        if hub_id == "lab/model":
            return str(tmp_path / "cache")
        raise huggingface_hub.errors.LocalEntryNotFoundError("outgoing traffic has been disabled")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    tokenizer.save_pretrained(tmp_path / "cache")
    assert SparseSDFTokenizer.from_pretrained("lab/model", device="cpu").model_hash == tokenizer.model_hash
    with pytest.raises(ValueError, match="lab/other: no such path here, and the hub did not give it: outgoing"):
        SparseSDFTokenizer.from_pretrained("lab/other", device="cpu")
    monkeypatch.chdir(tmp_path)
    shutil.copytree("cache", "lab/model")
    SparseSDFTokenizer.from_pretrained("lab/model", device="cpu")
    with pytest.raises(ValueError, match="no such checkpoint"):
        SparseSDFTokenizer.from_pretrained("/no/such/run", device="cpu")
    assert asked == ["lab/model", "lab/other"]
    assert checkpoints.PUBLISHED_FILES == ("config.json", "model.safetensors")


def test_devices_by_name(monkeypatch):
    assert resolve_device("cpu").type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert resolve_device(None).type == "cpu"
    for device, words in (("cuda", "finds 0 CUDA devices"), ("gpu", "must be cpu"), ("meta", "must be cpu")):
        with pytest.raises(ValueError, match=words):
            resolve_device(device)


def test_tokens_without_a_place(tokenizer, blocks, tmp_path):
    """Shapes of old files have no to_world; their tokens neither, and the mesh comes out in grid space."""
    tokens = tokenizer.encode(replace(blocks, to_world=None))
    save_tokens(tmp_path / "old.safetensors", tokens)
    again = load_tokens(tmp_path / "old.safetensors")
    assert again.to_world is None
    vertices, _ = tokenizer.decode_mesh(again)
    assert np.abs(vertices).max() <= 0.5 + 1e-9


def test_decoding_within_a_budget_has_the_values_of_the_whole(model, blocks, monkeypatch):
    whole = SparseSDFTokenizer(model, resolution=32)
    tokens = whole.encode(blocks)
    taken = []

    def small_parts(*given):
        parts_within(*given)
        taken.append(PartSizes(64, 56, 40))
        return taken[-1]

    monkeypatch.setattr("trellis.pipelines.tokenizer.parts_within", small_parts)
    parts = SparseSDFTokenizer(model, resolution=32, max_memory_gb=1.0).decode(tokens)
    assert len(taken) == 1
    # float32 on another path of the CPU's convolutions, then float16: one unit in the last place of 1
    np.testing.assert_allclose(
        parts.block_sdf.astype(float), whole.decode(tokens).block_sdf.astype(float), rtol=0, atol=1e-3
    )


def test_a_budget_that_is_too_small_says_what_is_enough(model, blocks):
    tokens = SparseSDFTokenizer(model, resolution=32).encode(blocks)
    with pytest.raises(ValueError, match=r"too little.*the least is 0\.1\d GB"):
        SparseSDFTokenizer(model, resolution=32, max_memory_gb=0.05).decode(tokens)
    with pytest.raises(ValueError, match="max_memory_gb must be above 0, got 0"):
        SparseSDFTokenizer(model, max_memory_gb=0)


@pytest.mark.parametrize("space", ["LPS", "RAS"])
def test_ply_from_tensors_is_what_write_mesh_writes(tokenizer, blocks, tmp_path, space):
    from trellis.utils.mesh_utils import write_mesh

    tokens = tokenizer.encode(blocks)
    vertices, faces = tokenizer.decode_mesh(tokens)
    write_mesh(tmp_path / "a.ply", vertices, faces, mesh_space=space)
    assert tokenizer.decode_ply(tokens, tmp_path / "b.ply", mesh_space=space) == len(faces)
    assert (tmp_path / "a.ply").read_bytes() == (tmp_path / "b.ply").read_bytes()
    write_mesh(tmp_path / "empty.ply", vertices[:0], faces[:0], mesh_space=space)
    assert (tmp_path / "empty.ply").read_bytes().endswith(b"end_header\n")


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [None, 0.5, 0.25])
def test_decoding_on_the_card_is_that_of_the_cpu(cuda_device, model, blocks, budget):
    tokens = SparseSDFTokenizer(model, resolution=32).encode(blocks)
    options = {"device": cuda_device, "compute_dtype": torch.float32, "max_memory_gb": budget}
    card = SparseSDFTokenizer(small_model(), resolution=32, **options)
    card.model.load_state_dict(model.state_dict())
    card.model_hash = tokens.model_hash
    torch.cuda.reset_peak_memory_stats()
    got = card.decode(tokens)
    want = SparseSDFTokenizer(model, resolution=32).decode(tokens)
    np.testing.assert_allclose(got.block_sdf.astype(float), want.block_sdf.astype(float), rtol=0, atol=1e-3)
    vertices, faces = card.decode_mesh(tokens)
    from trellis.geometry.isosurface import extract_mesh

    expected = extract_mesh(got)
    np.testing.assert_allclose(vertices, expected[0], rtol=0, atol=1e-9)
    rows = (part[np.lexsort(part.T)] for part in (faces, expected[1]))
    np.testing.assert_array_equal(*rows)
    if budget is not None:
        assert torch.cuda.max_memory_allocated() < budget * 1e9

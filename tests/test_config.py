"""Configs: the shipped ones parse, and everything that is wrong with another is said at once."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from trellis.config import ConfigError, Named, apply_override, load_config, parse_config
from trellis.trainers.build import CLASSES

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "vae"

EXPECTED = {
    64: {"use_checkpoint": False, "points": (10, None), "batch": (4, 1), "lr": 1e-4},
    512: {"use_checkpoint": False, "points": (100, 500_000), "batch": (2, 2), "lr": 5e-5},
    1024: {"use_checkpoint": True, "points": (1000, 2_000_000), "batch": (1, 4), "lr": 2e-5},
}


def base() -> dict:
    return json.loads((CONFIGS / "sparse_sdf_vqvae_64.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda p: p.stem)
def test_shipped_configs_parse(path: Path):
    config = load_config(path, signatures=CLASSES)
    assert config.model.name == "SparseSDFVQVAE" and config.dataset.name == "SparseSDF"


@pytest.mark.parametrize("resolution", EXPECTED)
def test_shipped_configs_hold_the_published_values(resolution: int):
    config = load_config(CONFIGS / f"sparse_sdf_vqvae_{resolution}.json", signatures=CLASSES)
    want, model, data, trainer = EXPECTED[resolution], config.model.args, config.dataset.args, config.trainer
    assert config.model_name == "vqvae"
    assert (model["model_channels"], model["latent_channels"], model["num_blocks"]) == (512, 32, 8)
    assert (model["num_embeddings"], model["num_heads"], model["num_head_channels"]) == (8192, None, 64)
    assert (model["window_size"], model["attn_mode"], model["pe_mode"]) == (8, "swin", "ape")
    assert model["use_checkpoint"] is want["use_checkpoint"] and model["use_fp16"] is True
    assert data["resolution"] == resolution
    assert (data["min_points"], data["max_points"]) == want["points"]
    assert (trainer.batch_size_per_gpu, trainer.batch_split) == want["batch"]
    assert trainer.optimizer.args["lr"] == want["lr"]
    assert (trainer.lambda_vq, trainer.lambda_commitment, trainer.loss_type) == (1.0, 0.25, "mse")
    assert trainer.pretrained_vae_path is None and trainer.max_epoch is None


def test_every_problem_is_in_one_message():
    raw = base()
    raw["trainer"]["args"]["max_stepz"] = 5
    raw["trainer"]["args"]["loss_type"] = "huber"
    raw["trainer"]["args"]["batch_split"] = 0
    raw["trainer"]["args"]["i_save"] = "often"
    raw["models"]["vqvae"]["args"]["model_chanels"] = 64
    raw["models"]["vqvae"]["args"]["num_blocks"] = 1.5
    raw["dataset"]["args"]["max_point"] = 1
    del raw["dataset"]["args"]["resolution"]
    raw["extra"] = {}
    with pytest.raises(ConfigError) as caught:
        parse_config(raw, source="some.json", signatures=CLASSES)
    text = str(caught.value)
    assert text.startswith("some.json: 8 problems")  # batch_split is only checked once the types are right
    for part in (
        "trainer.args.max_stepz: unknown key (did you mean 'max_steps'?); valid keys: batch_size",
        'trainer.args.loss_type: must be "mse" or "l1" or "l1_l2", got "huber"',
        'trainer.args.i_save: must be a whole number or null, got "often"',
        "models.vqvae.args.model_chanels: unknown key (did you mean 'model_channels'?)",
        "models.vqvae.args.num_blocks: must be a whole number, got 1.5",
        "dataset.args.max_point: unknown key (did you mean 'max_points'?)",
        "dataset.args.resolution: is missing",
        "extra: unknown key; valid keys: dataset, models, trainer",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_steps": None}, "max_steps or max_epoch is needed"),
        ({"batch_size": 4}, "exactly one of batch_size and batch_size_per_gpu"),
        ({"batch_size_per_gpu": None}, "exactly one of batch_size and batch_size_per_gpu"),
        ({"batch_split": 0}, "batch_split: must be at least 1, got 0"),
        ({"ema_rate": [0.9, 1.0]}, "ema_rate: must be in [0, 1)"),
        ({"ema_rate": [0.9, 0.9]}, "without a rate given twice"),
        ({"grad_clip": 0}, "grad_clip: must be above 0"),
        ({"grad_clip": {"name": "AdaptiveGradClipper", "arg": {}}}, "grad_clip.arg: unknown key"),
        ({"optimizer": {"args": {"lr": 1}}}, "optimizer.name: is missing"),
        ({"max_steps": True}, "max_steps: must be a whole number or null, got true"),
        ({"lambda_vq": float("nan")}, "lambda_vq: must be a number, got NaN"),
        ({"lambda_vq": -1}, "lambda_vq: must be at least 0"),
        ({"fp16_mode": "inflate_all"}, "did you mean 'inflat_all'?"),
        ({"finetune_ckpt": 3}, "finetune_ckpt: must be"),
        ({"i_print": 0}, "i_print: must be null or at least 1"),
        ({"seed": 10**20}, "seed: must be below 2**63, got 100000000000000000000"),
        ({"lambda_vq": 10**400}, "lambda_vq: must be a number, got 1000"),
        ({"ema_rate": [0.5, 10**400]}, "ema_rate: must be a number or a list"),
    ],
)
def test_trainer_rules(change: dict, message: str):
    raw = base()
    raw["trainer"]["args"] |= change
    with pytest.raises(ConfigError) as caught:
        parse_config(raw)
    assert message in str(caught.value)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    "raw", [[], {}, {"models": {}}, {"models": {"a": 1, "b": 2}}, {"models": {"a": None}}, {"trainer": []}]
)
def test_shapes_that_are_no_config(raw):
    with pytest.raises(ConfigError):
        parse_config(raw, signatures=CLASSES)


@pytest.mark.parametrize("name", ["a/b", "", "a b", "../a", "\u00e9", "a\n", "x" * 129])
def test_a_model_name_is_part_of_file_names(name: str):
    raw = base()
    raw["models"] = {name: raw["models"]["vqvae"]}
    with pytest.raises(ConfigError) as caught:
        parse_config(raw, signatures=CLASSES)
    assert len(caught.value.problems) == 1
    assert "models: a name becomes part of file names and must be" in str(caught.value)


def test_usual_model_names_and_seeds_are_taken():
    raw = base()
    raw["models"] = {"vq-vae_1.2": raw["models"]["vqvae"]}
    raw["trainer"]["args"]["seed"] = 2**63 - 1
    assert parse_config(raw, signatures=CLASSES).model_name == "vq-vae_1.2"


def test_numbers_of_models_beyond_floats_are_problems():
    raw = base()
    raw["models"]["vqvae"]["args"]["mlp_ratio"] = 10**400
    with pytest.raises(ConfigError, match="mlp_ratio: must be a number"):
        parse_config(raw, signatures=CLASSES)


def test_class_names_are_checked():
    raw = base()
    raw["models"]["vqvae"]["name"] = "SparseSdfVQVAE"
    with pytest.raises(ConfigError, match="must be one of SparseSDFVQVAE, got 'SparseSdfVQVAE'.*did you mean"):
        parse_config(raw, signatures=CLASSES)


def test_types_are_what_they_say():
    raw = base()
    raw["trainer"]["args"] |= {"ema_rate": 0.5, "grad_clip": 1, "lr_scheduler": {"name": "StepLR"}}
    args = parse_config(raw, signatures=CLASSES).trainer
    assert args.ema_rates == [0.5] and isinstance(args.grad_clip, float)
    assert args.lr_scheduler == Named("StepLR", {})
    assert args.optimizer == Named("AdamW", {"lr": 1e-4, "weight_decay": 0.0})


def test_overrides(tmp_path: Path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps(base()), encoding="utf-8")
    config = load_config(
        path,
        ["trainer.args.max_steps=40", "trainer.args.ema_rate=[0.9, 0.99]", "trainer.args.loss_type=l1",
         "trainer.args.lr_scheduler.name=StepLR", "trainer.args.lr_scheduler.args.step_size=3",
         "trainer.args.optimizer.args.lr=2e-3", "models.vqvae.args.num_blocks=1"],
        signatures=CLASSES,
    )
    assert config.trainer.max_steps == 40 and config.trainer.ema_rates == [0.9, 0.99]
    assert config.trainer.loss_type == "l1" and config.trainer.optimizer.args["lr"] == 2e-3
    assert config.trainer.lr_scheduler == Named("StepLR", {"step_size": 3})
    assert config.raw["models"]["vqvae"]["args"]["num_blocks"] == 1


def test_bad_overrides_are_all_reported(tmp_path: Path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps(base()), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["trainer.args.max_steps", "trainer.args.max_steps.x=1", "=3", "trainer.args.max_stes=1"])
    assert len(caught.value.problems) == 4
    assert "trainer.args.max_steps is no object" in str(caught.value)


def test_override_does_not_replace_a_list():
    problems: list[str] = []
    raw = {"a": [1]}
    apply_override(raw, "a.b=1", problems)
    assert problems and raw == {"a": [1]}


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not readable as JSON"), ('{"a": 1, "a": 2}', "given twice"), ("\xff", "not readable"),
     (None, "no such file")],
)
def test_files_that_are_no_json(tmp_path: Path, text: str | None, message: str):
    path = tmp_path / "c.json"
    if text is not None:
        path.write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_parsing_changes_nothing():
    raw = base()
    before = copy.deepcopy(raw)
    parse_config(raw, signatures=CLASSES)
    assert raw == before

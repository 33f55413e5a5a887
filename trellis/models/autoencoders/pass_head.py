"""What a training pass makes of its outputs before anything leaves it, such as the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from trellis.models.autoencoders.pass_graphs import Rows


@dataclass(frozen=True)
class Head:
    """What becomes of a training pass's outputs, before anything leaves it.

    Passes are recorded for one object: make it once and keep it. What its function reads beside its arguments counts
    as it was when the pass was recorded.

    Attributes:
        function: of the outputs of `SparseSDFVQVAE.forward` (no `codebook_rows` where moving averages train the
            codebook) and of the batch's `block_coords` int32, `block_sdf`, `active` and `inputs`, to tensors [M, ...]
            by name. Those of them that have a gradient must not mix blocks, nor may it read weights.
        inputs: further keys of the batch, tensors [M, ...].
    """

    function: Callable[[Rows, Rows], Rows]
    inputs: tuple[str, ...] = ()

    def after(self, out: Rows, batch: Rows) -> Rows:
        """`function`'s result, with the codes and the latents that the codebook's statistics need."""
        return {"ids": out["ids"], "latent": out["latent"].detach(), **self.function(out, batch)}

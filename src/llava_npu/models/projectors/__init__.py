"""Projectors: from the vision tower's patch features to the language model's tokens.

One file and one registration each. Importing this package needs torch only.
"""

from llava_npu.models.projectors import (  # noqa: F401  (each registers itself)
    adaptive_pool,
    c_abstractor,
    d_abstractor,
    dense_connector,
    identity,
    ldp,
    ldpv2,
    linear,
    matryoshka_pool,
    mlp,
    mqt,
    patch_merger,
    pixel_shuffle,
    qformer,
    resampler,
    sva,
    tokenpacker,
)
from llava_npu.models.projectors.base import NestedOptions, NestedProjector, Projector, ProjectorOptions, load_weights
from llava_npu.models.projectors.grid import Grid
from llava_npu.models.projectors.registry import (
    available,
    build_projector,
    canonical_type,
    feature_layers,
    grid_defaults,
    make_options,
    num_tokens,
    registered_name,
    registrations,
    token_grid,
)

__all__ = [
    "Grid",
    "NestedOptions",
    "NestedProjector",
    "Projector",
    "ProjectorOptions",
    "available",
    "build_projector",
    "canonical_type",
    "feature_layers",
    "grid_defaults",
    "load_weights",
    "make_options",
    "num_tokens",
    "registered_name",
    "registrations",
    "token_grid",
]

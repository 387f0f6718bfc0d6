"""Tables of schemes on a network with random weights: bits of every layer, shares of weights, bytes in the files."""

from __future__ import annotations

import logging

from app.core.config import Config
from app.core.scheme import FULL, Scheme, builtin_names, find_scheme
from app.quant.model import float_network
from app.quant.schemes import is_learned, shares
from app.quant.sizes import FLOAT_BYTES, Layer, layers_of
from app.report.tables import MISSING, markdown_table

log = logging.getLogger(__name__)
N_HASH = 12  # hex digits
LAYER_COLUMNS: tuple[str, ...] = ("layer", "why", "shape", "bits", "scales", "weights", "share", "bytes")
SCHEME_COLUMNS: tuple[str, ...] = (
    "scheme",
    "share of the weights by bits",
    "INT4 bytes",
    "QCDQ bytes",
    "FP32 bytes",
    "INT4 / FP32",
)


def list_layers(config: Config, scheme: Scheme) -> None:
    """Logs every layer of one scheme, and its sums.

    Raises:
        UserError: a layer without a pattern, or a pattern without a layer.
    """
    layers = layers_of(float_network(config), scheme)
    n_learned = sum(layer.n_weights for layer in layers if is_learned(layer.name, layer.rule))
    show([list(LAYER_COLUMNS), *(layer_row(layer, n_learned) for layer in layers)], n_text_columns=2)
    log.info("bytes: codes and scales in the INT4 file; %s: the training alone has this layer", MISSING)
    show([list(SCHEME_COLUMNS), scheme_row(scheme, layers)], n_text_columns=2)
    log.info("scheme %s on %s; sha256 of its rules %s", scheme, config.model, scheme.sha256[:N_HASH])


def list_schemes(config: Config) -> None:
    """Logs the built-in schemes side by side."""
    model = float_network(config)
    cells = [list(SCHEME_COLUMNS)]
    for name in builtin_names():
        scheme = find_scheme(name)
        cells.append(scheme_row(scheme, layers_of(model, scheme)))
    show(cells, n_text_columns=2)
    log.info("%s; bytes: codes and scales, without BatchNorm and graph; a scheme's layers: --scheme FILE", config.model)


def layer_row(layer: Layer, n_learned: int) -> list[str]:
    """A line of LAYER_COLUMNS; `n_learned` is the number of learned convolution weights of the model."""
    shape = "x".join(map(str, layer.conv.weight.shape))
    share = f"{layer.n_weights / n_learned:.3%}" if is_learned(layer.name, layer.rule) else MISSING
    size = f"{layer.n_bytes(packs=True):,}" if layer.is_in_file else MISSING
    numbers = [f"{layer.n_scales:,}", f"{layer.n_weights:,}", share, size]
    bits = f"{layer.rule.bits}, full range" if layer.rule.range == FULL else str(layer.rule.bits)
    return [layer.name, layer.rule.why, shape, bits, *numbers]


def scheme_row(scheme: Scheme, layers: list[Layer]) -> list[str]:
    """A line of SCHEME_COLUMNS."""
    weights = {layer.name: layer.conv for layer in layers}
    rules = {layer.name: layer.rule for layer in layers}
    by_bits = [f"{bits}: {share:.2%}" for bits, share in shares(weights, rules).items()]
    packed = sum(layer.n_bytes(packs=True) for layer in layers)
    unpacked = sum(layer.n_bytes(packs=False) for layer in layers)
    in_fp32 = sum(layer.n_weights * FLOAT_BYTES for layer in layers if layer.is_in_file)
    return [scheme.name, ", ".join(by_bits), f"{packed:,}", f"{unpacked:,}", f"{in_fp32:,}", f"{packed / in_fp32:.4f}"]


def show(cells: list[list[str]], n_text_columns: int) -> None:
    for line in markdown_table(cells, n_text_columns):
        log.info("%s", line)

"""What a figure needs of the evidence, small enough to publish: a sample of tokens, all sequences, binned sums.

plot_points.parquet is one long table; `kind` says which columns of a row are filled:

    token         mu, pi (probabilities of the sampled token), is_tail (one of the largest |pi - mu|; others: a sample)
    sequence      num_tokens, seq_log_ratio (sum of log pi - log mu, nats)
    by_position   bin [bin_low, bin_high) of the position in the response, in tokens; count, sum_k3, sum_abs_prob_diff
    by_length     the same over the length of the token's response, in tokens
    by_entropy    the same over the entropy of pi where the token was drawn, nats; only where the run recorded it
    by_prob       the same over mu, the sampler's probability of the token
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from suite.door import read_parquet
from suite.files import write_parquet
from suite.measure.bins import bin_sums, token_property
from suite.record.evidence import flat, is_scored, num_response_tokens, whole_rows

NUM_TAIL_TOKENS, NUM_TOKENS, NUM_SEQUENCES = 500, 3000, 4000
SAMPLE_SEED = 2510_26788
PROB_EDGES = np.array([0.0, 1e-3, 1e-2, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99, 0.999, 1.0 + 1e-6])
POSITION_EDGES = np.unique(np.round(np.geomspace(1, 2**17, 35)).astype(int)) - 1  # half-octaves: 0, 1, 2, 3, 5, 7 ...
ENTROPY_EDGES = np.array([0.0, *np.geomspace(1e-3, 16.0, 29)])  # nats; the last is above the log of any vocabulary
# kind -> (property of suite/measure/bins.py, edges of its bins)
BINNED = {"by_position": ("position", POSITION_EDGES), "by_length": ("length", POSITION_EDGES),
          "by_entropy": ("entropy", ENTROPY_EDGES), "by_prob": ("probability", PROB_EDGES)}  # fmt: skip

_COLUMNS = {
    "mu": pa.float32(),
    "pi": pa.float32(),
    "is_tail": pa.bool_(),
    "num_tokens": pa.int32(),
    "seq_log_ratio": pa.float32(),
    "bin_low": pa.float64(),
    "bin_high": pa.float64(),
    "count": pa.int64(),
    "sum_k3": pa.float64(),
    "sum_abs_prob_diff": pa.float64(),
}


def plot_points(evidence: Path) -> dict[str, dict[str, np.ndarray]]:
    """Points and bins of all evidence parts in a folder, read part by part (points_of); {} of evidence that no trainer
    scored: it has no pi."""
    parts = sorted(evidence.glob("part-*.parquet"))
    return points_of(map(_read_part, parts)) if parts and all(map(_is_scored, parts)) else {}


def points_of(parts: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]) -> dict[str, dict[str, np.ndarray]]:
    """Points and bins of rollouts that come in parts: log mu and log pi (T,) in nats, response lengths (N,), and entropies
    (T,) or none.

    Returns {kind: {column: values}}. Tokens: the NUM_TAIL_TOKENS with the largest |pi - mu| of the run, and a uniform
    sample of the rest up to NUM_TOKENS in all. The sample is fixed: it depends on the number of tokens and their order.
    """
    rng = np.random.default_rng(SAMPLE_SEED)
    tokens, sequences = np.empty((0, 3)), np.empty((0, 3))
    bins = {kind: np.zeros((len(edges) - 1, 3)) for kind, (_, edges) in BINNED.items()}
    for log_mu, log_pi, lengths, entropies in parts:
        mu, pi, r = np.exp(log_mu), np.exp(log_pi), log_pi - log_mu
        tokens = _thin_tokens(np.vstack([tokens, np.column_stack([mu, pi, rng.random(len(mu))])]))
        for kind, (by, edges) in BINNED.items():
            if by != "entropy" or len(entropies) == len(r):
                bins[kind] += bin_sums(token_property(by, len(r), lengths, log_mu, entropies), edges, r, pi - mu)
        ratio = np.add.reduceat(np.append(r, 0.0), np.cumsum(lengths) - lengths) * (lengths > 0)
        sequences = _thin(
            np.vstack([sequences, np.column_stack([lengths, ratio, rng.random(len(lengths))])]), NUM_SEQUENCES
        )
    return {
        "token": _token_columns(tokens),
        "sequence": {"num_tokens": sequences[:, 0].astype(int), "seq_log_ratio": sequences[:, 1]},
    } | {kind: _bin_columns(bins[kind], edges) for kind, (_, edges) in BINNED.items() if bins[kind].any()}


def _is_scored(path: Path) -> bool:
    columns = {"trainer_logprobs", "sum_k3"} & set(pq.read_schema(path).names)  # the latter where rows were thinned
    return is_scored(pq.read_table(path, columns=sorted(columns)))


def _read_part(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(log mu, log pi) of all response tokens that a part keeps, flat, in nats and float64; the response lengths; and the
    entropies of pi, empty where none were recorded."""
    table = whole_rows(pq.read_table(path))
    log_mu, log_pi = flat(table, "rollout_logprobs"), flat(table, "trainer_logprobs")
    entropies = flat(table, "trainer_entropies") if "trainer_entropies" in table.column_names else np.empty(0)
    return log_mu, log_pi, num_response_tokens(table), entropies


def _is_tail(tokens: np.ndarray) -> np.ndarray:
    tail = np.zeros(len(tokens), dtype=bool)
    tail[np.argsort(-np.abs(tokens[:, 1] - tokens[:, 0]), kind="stable")[:NUM_TAIL_TOKENS]] = True
    return tail


def _thin(rows: np.ndarray, most: int) -> np.ndarray:
    """The `most` rows with the smallest random key (last column), in their old order: a uniform sample of a stream."""
    return rows[np.sort(np.argsort(rows[:, -1], kind="stable")[:most])]


def _thin_tokens(tokens: np.ndarray) -> np.ndarray:
    tail = _is_tail(tokens)
    return np.vstack([tokens[tail], _thin(tokens[~tail], NUM_TOKENS - NUM_TAIL_TOKENS)])


def _token_columns(tokens: np.ndarray) -> dict[str, np.ndarray]:
    order = np.lexsort((tokens[:, 1], tokens[:, 0]))
    return {"mu": tokens[order, 0], "pi": tokens[order, 1], "is_tail": _is_tail(tokens[order])}


def _bin_columns(bins: np.ndarray, edges: np.ndarray) -> dict[str, np.ndarray]:
    used = bins[:, 0] > 0
    return {
        "bin_low": edges[:-1][used].astype(float),
        "bin_high": edges[1:][used].astype(float),
        "count": bins[used, 0].astype(int),
        "sum_k3": bins[used, 1],
        "sum_abs_prob_diff": bins[used, 2],
    }


def write_points(path: Path, points: dict[str, dict[str, np.ndarray]]) -> None:
    tables = []
    for kind, columns in points.items():
        length = len(next(iter(columns.values())))
        arrays = {"kind": pa.array([kind] * length, pa.string())}
        for name, dtype in _COLUMNS.items():
            arrays[name] = pa.array(columns[name], dtype) if name in columns else pa.nulls(length, dtype)
        tables.append(pa.table(arrays))
    write_parquet(path, pa.concat_tables(tables).combine_chunks())


def _is_plain(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def read_points(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """The inverse of write_points: {kind: {column: values}}, only the columns that the kind fills."""
    table = read_parquet(path, {"kind": pa.types.is_string} | dict.fromkeys(_COLUMNS, _is_plain), max_rows=1_000_000)
    kinds = np.asarray(table["kind"].to_pylist(), dtype=object)
    columns = {name: table[name] for name in _COLUMNS}
    points = {}
    for kind in dict.fromkeys(kinds):
        rows = pa.array(np.flatnonzero(kinds == kind))
        chosen = {name: column.take(rows) for name, column in columns.items()}
        points[kind] = {n: c.to_numpy() for n, c in chosen.items() if c.null_count == 0}
    return points

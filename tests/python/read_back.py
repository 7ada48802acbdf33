"""Reads an exported trace back with the libraries that people use, and checks that all of them count the same.

    python3 read_back.py trace.arrows trace.parquet stats.json [trace.jsonl] [counts.npy]

`trace.arrows` is a trace; the others are what `expert-trace export` has made of it. Needs duckdb, polars,
pandas, pyarrow and numpy. Ends with status 0 when every library finds the counts of the statistics.
"""

import collections
import json
import sys

import duckdb
import numpy
import pandas
import polars
import pyarrow.ipc

KEYS = ["context", "layer", "expert", "phase"]


def of_statistics(path):
    """Activations by context, layer, expert and phase, as the document has them."""
    counts = {}
    with open(path) as file:
        statistics = json.load(file)
    for context in statistics["contexts"]:
        for layer in context["layers"]:
            for expert in layer["experts"]:
                for phase in ("prefill", "decode"):
                    if expert[phase]:
                        key = (context["trace_context"], layer["layer_id"], expert["expert_id"], phase)
                        counts[key] = expert[phase]
    return statistics, counts


def of_frame(frame):
    """The same of a pandas frame of a trace."""
    frame = frame[frame["record"].astype(str) == "routed"]
    frame = frame[["context", "layer", "phase", "experts"]].explode("experts").dropna()
    counts = collections.Counter()
    for row in frame.itertuples(index=False):
        counts[(int(row.context), int(row.layer), int(row.experts), str(row.phase))] += 1
    return dict(counts)


def of_duckdb(source):
    """The same of DuckDB, which reads `source`."""
    query = f"""
        select context, layer, expert, phase, count(*)
        from (select context, layer, phase, unnest(experts) as expert
              from {source} where record = 'routed')
        group by all
    """
    rows = duckdb.sql(query).fetchall()
    return {(c, l, e, str(p)): n for c, l, e, p, n in rows}


def of_polars(frame):
    """The same of a Polars frame."""
    counts = (
        frame.with_columns(polars.col("record").cast(polars.String), polars.col("phase").cast(polars.String))
        .filter(polars.col("record") == "routed")
        .select("context", "layer", "phase", polars.col("experts").alias("expert"))
        .explode("expert")
        .drop_nulls("expert")
        .group_by(KEYS)
        .len()
    )
    return {(c, l, e, p): n for c, l, e, p, n in counts.select(*KEYS, "len").iter_rows()}


def check(name, expected, found):
    if found != expected:
        differing = [key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)]
        for key in sorted(differing)[:10]:
            print(f"{name}: {key}: {found.get(key)}, not {expected.get(key)}", file=sys.stderr)
        sys.exit(f"{name}: {len(differing)} counts differ")
    print(f"{name}: {sum(found.values())} activations")


def check_array(path, statistics, expected):
    """Layers of the main context, ascending; experts; prefill and decode."""
    array = numpy.load(path)
    context = statistics["contexts"][statistics["layers_context"]]
    number = context["trace_context"]
    layers = [layer["layer_id"] for layer in context["layers"]]
    assert array.dtype == numpy.uint64 and array.shape[0] == len(layers) and array.shape[2] == 2, array.shape
    found = {
        (number, layers[layer], int(expert), ("prefill", "decode")[phase]): int(array[layer, expert, phase])
        for layer, expert, phase in zip(*numpy.nonzero(array))
    }
    wanted = {key: count for key, count in expected.items() if key[0] == number}
    check("numpy", wanted, found)


def main(trace, parquet, statistics_path, *others):
    statistics, expected = of_statistics(statistics_path)
    assert expected, "nothing was routed"
    with pyarrow.ipc.open_stream(trace) as reader:
        check("pyarrow, Arrow", expected, of_frame(reader.read_pandas()))
    check("pandas, Parquet", expected, of_frame(pandas.read_parquet(parquet)))
    check("DuckDB, Parquet", expected, of_duckdb(f"'{parquet}'"))
    check("Polars, Parquet", expected, of_polars(polars.read_parquet(parquet)))
    check("Polars, Arrow", expected, of_polars(polars.read_ipc_stream(trace)))
    for path in others:
        if path.endswith(".npy"):
            check_array(path, statistics, expected)
        else:
            check("DuckDB, JSON", expected, of_duckdb(f"read_json('{path}', format='newline_delimited')"))


if __name__ == "__main__":
    if not 4 <= len(sys.argv) <= 6:
        sys.exit(__doc__)
    main(*sys.argv[1:])

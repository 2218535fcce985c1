"""Results as tables: the same rows for the terminal and as Markdown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table as RichTable

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Table:
    """A title, column heads and rows of text, and notes to stand below."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def to_rich(self) -> RichTable:
        """For the terminal: numbers to the right."""
        table = RichTable(title=self.title, title_justify="left", caption="\n".join(self.notes))
        table.caption_justify = "left"
        for index, column in enumerate(self.columns):
            numeric = index > 0 and all(
                row[index][:1].isdigit() or row[index][:1] == "-" for row in self.rows
            )
            table.add_column(column, justify="right" if numeric else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def to_markdown(self) -> str:
        """For a document."""
        lines = [f"**{self.title}**", "", _line(self.columns), _line(["---"] * len(self.columns))]
        lines += [_line(row) for row in self.rows]
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes)]) + "\n"


def bench_tables(results: Sequence[Mapping[str, Any]]) -> list[Table]:
    """The tables of one or several benchmarks, the paper's beside them."""
    speed = Table(
        "Speed, one frame at a time",
        ["region", "frames/s", "p50 ms", "p90 ms", "p99 ms", "frames", "measured"],
        [
            [
                row["region"],
                f"{row['frames_per_second']:.3f}",
                *(f"{row[key]:.1f}" for key in ("p50_ms", "p90_ms", "p99_ms")),
                f"{row['frames']} after {row['warmup_frames']}",
                conditions(row),
            ]
            for result in results
            for row in result["rows"]
        ],
    )
    stages = Table(
        "Time per stage and frame (region A)",
        ["run", "stage", "uses", "infer ms", "queue ms", "copy ms"],
        [
            [
                _run(result),
                stage["stage"],
                f"{stage['uses']:g}",
                *(f"{stage[key]:.2f}" for key in ("infer_ms", "queue_ms", "transfer_ms")),
            ]
            for result in results
            for stage in result["stages"]
        ],
    )
    memory = Table(
        "Memory",
        ["run", "what", "MiB"],
        [[_run(result), what, f"{size / MIB:.1f}"] for result in results for what, size in _sizes(result)],
        [
            f"{_run(result)}: the server runs elsewhere, its memory is not seen"
            for result in results
            if "server" in result["memory"] and not result["memory"]["server"]
        ],
    )
    return [speed, stages, memory, paper_table(results[0]["paper"])]


def _run(result: Mapping[str, Any]) -> str:
    row = result["rows"][0]
    return f"{row['how']}, {row['layout']}"


def _sizes(result: Mapping[str, Any]) -> list[tuple[str, int]]:
    memory = result["memory"]
    peaks = [(who, memory[who]) for who in ("server", "client") if memory.get(who)]
    return [
        ("model files (nearly all weights)", memory["model_bytes"]),
        *((f"{who} peak, shared pages once (PSS)", peak["pss_bytes"]) for who, peak in peaks),
        *((f"{who} peak, shared pages per process (RSS)", peak["rss_bytes"]) for who, peak in peaks),
    ]


def conditions(row: Mapping[str, Any]) -> str:
    """In a few words, what a measured row stands on."""
    threads = f"{row['threads']} threads" if row["threads"] else "threads unknown"
    return (
        f"{row['how']}, {row['hardware']}, {threads}, load {row['load_before']:g} before, {row['runtime']} "
        f"{row['precision']}, {row['layout']} layout, {row['mean_points']} points, {row['weights']}"
    )


def paper_table(paper: Mapping[str, Any]) -> Table:
    """The paper's efficiency table with its caveats."""
    return Table(
        f"{paper['source']}; {paper['measured_on']}",
        [column.replace("_", " ") for column in paper["columns"]],
        [[str(value) for value in row] for row in paper["rows"]],
        paper["caveats"],
    )


def eval_tables(result: Mapping[str, Any]) -> list[Table]:
    """The tables of an evaluation."""
    kinds = {"all": {"frames": result["frames"], **result["metrics"]}, **result["per_defect"]}
    verdicts = result["verdicts"]
    note = (
        f"verdicts at threshold {result['threshold']:g}: {verdicts['found']} defects found, {verdicts['missed']} "
        f"missed, {verdicts['false_alarms']} false alarms, {verdicts['passed']} good parts passed"
    )
    tables = [
        Table(
            f"{result['category']}, split {result['split']} ({result['weights']})",
            ["metric", *kinds],
            [
                ["frames", *(str(found["frames"]) for found in kinds.values())],
                *(
                    [metric.replace("_", " "), *(f"{found[metric]:.4f}" for found in kinds.values())]
                    for metric in result["metrics"]
                ),
            ],
            [note],
        )
    ]
    if "score_maps" in result:
        tables.append(
            Table(
                "Each score map alone",
                ["map", "image auroc", "pixel auroc"],
                [
                    [name, f"{m['image_auroc']:.4f}", f"{m['pixel_auroc']:.4f}"]
                    for name, m in result["score_maps"].items()
                ],
            )
        )
    return tables


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"

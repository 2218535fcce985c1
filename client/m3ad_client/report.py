"""Results as tables: the same rows for the terminal and as Markdown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from m3ad_runtime.worker import INFERENCE_ONLY
from rich.table import Table as RichTable

from m3ad_client.bench import OWN_ENCODER

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Table:
    """A title, column heads and rows of text, and notes to stand below."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def to_rich(self) -> RichTable:
        """For the terminal: numbers to the right, long cells folded, never cut. Print it on a plain console."""
        table = RichTable(title=self.title, title_justify="left", caption="\n".join(self.notes))
        table.caption_justify = "left"
        for index, column in enumerate(self.columns):
            numeric = index > 0 and all(
                row[index][:1].isdigit() or row[index][:1] == "-" for row in self.rows
            )
            table.add_column(column, justify="right" if numeric else "left", overflow="fold")
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
    rows = [(result, row) for result in results for row in result["rows"]]
    speed = Table(
        "Speed, one frame at a time, the forms in turn on the same frames",
        ["form", "region", "frames/s", "p50 ms", "p90 ms", "p99 ms", "time over reference", "cold start s"],
        [
            [
                row["name"],
                row["region"],
                f"{row['frames_per_second']:.3f}",
                *(f"{row[key]:.1f}" for key in ("p50_ms", "p90_ms", "p99_ms")),
                _ratio_cell(result, row),
                f"{row['cold_start_ms'] / 1e3:.1f}" if row["cold_start_ms"] else "",
            ]
            for result, row in rows
        ],
        [
            *dict.fromkeys(conditions(row) for _, row in rows),
            *(n for r in results for n in (*_own_encoder(r), *_doors(r))),
            *dict.fromkeys(
                f"energy is not measured: {why}" for r in results if (why := r.get("energy_not_measured"))
            ),
        ],
    )
    stages = Table(
        "Time per stage and frame (inference only)",
        ["form", "stage", "uses", "infer ms", "queue ms", "copy ms"],
        [
            [
                stage["run"],
                stage["stage"],
                f"{stage['uses']:g}",
                *(f"{stage[key]:.2f}" for key in ("infer_ms", "queue_ms", "transfer_ms")),
            ]
            for result in results
            for stage in result["stages"]
        ],
    )
    memory = Table(
        "Memory in MiB",
        ["form", "parameters", "peak, shared pages once (PSS)", "peak RSS", "device peak", "growth"],
        [[name, *_memory_cells(found)] for result in results for name, found in result["memory"].items()],
        ["a peak is of the form's own process, for Triton of the server and its children; empty: not seen"],
    )
    energy = [table for result in results for table in _energy_tables(result.get("energy"))]
    made = [_artefact_table(result["artefacts"]) for result in results if "artefacts" in result]
    return [speed, stages, memory, *energy, *made, paper_table(results[0]["paper"])]


def _ratio_cell(result: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    reference = result["rows"][0]["name"]
    name = f"{row['name']}/{reference}"
    if not row["region"].startswith(INFERENCE_ONLY) or name not in result["ratios"]:
        return ""
    spread = result["ratio_spread"][name]
    return f"{result['ratios'][name]:.2f} ({spread['low']:.2f} .. {spread['high']:.2f})"


def _doors(result: Mapping[str, Any]) -> list[str]:
    inside = {row["name"] for row in result["rows"] if row["region"].startswith(INFERENCE_ONLY)}
    told = []
    for name in dict.fromkeys(row["name"] for row in result["rows"] if row["name"] not in inside):
        for ratio, value in result["ratios"].items():
            if ratio.startswith(f"{name}/"):
                spread = result["ratio_spread"][ratio]
                times = f"{value:.2f} ({spread['low']:.2f} .. {spread['high']:.2f}) times"
                told.append(
                    f"end to end a frame of {name} takes {times} one of {ratio.removeprefix(f'{name}/')}"
                )
    return told


def _own_encoder(result: Mapping[str, Any]) -> list[str]:
    return [
        f"a frame of {name.removesuffix(OWN_ENCODER)} takes {value:.2f} times its own RGB encoder"
        for name, value in result["ratios"].items()
        if name.endswith(OWN_ENCODER)
    ]


def _memory_cells(found: Mapping[str, Any]) -> list[str]:
    peak, growth = found["peak"] or {}, found.get("growth")
    sizes = (found["parameter_bytes"], peak.get("pss_bytes"), peak.get("rss_bytes"), found["device_bytes"])
    cells = ["" if size is None else f"{size / MIB:.0f}" for size in sizes]
    return [*cells, f"{growth['bytes'] / MIB:+.0f} up to frame {growth['frames']}" if growth else ""]


def _energy_tables(energy: Mapping[str, Any] | None) -> list[Table]:
    if not energy:
        return []
    return [
        Table(
            "Energy of a frame: of the board on a Jetson, of the first GPU elsewhere",
            ["form", "joules a frame", "mean watts", "frames", "read from"],
            [
                [name, f"{e['joules_per_frame']:.2f}", f"{e['watts']:.1f}", str(e["frames"]), e["source"]]
                for name, e in energy.items()
            ],
            ["inference only, through a door for frames end to end; what the machine takes idle is in it"],
        )
    ]


def _artefact_table(made: Mapping[str, Any]) -> Table:
    return Table(
        "Artefacts",
        ["what", "seconds to make", "MB"],
        [
            ["ONNX, both layouts", f"{made['export_s']:.1f}", f"{made['onnx_bytes'] / 1e6:.1f}"],
            *(
                [f"engines {target}, {e['precision']}", f"{e['build_s']:.1f}", f"{e['bytes'] / 1e6:.1f}"]
                for target, e in made["engines"].items()
            ),
        ],
    )


def conditions(row: Mapping[str, Any]) -> str:
    """In a few words, what a measured row stands on."""
    error, largest = row["map_max_error"], row.get("map_largest")
    same = "another method's map" if error is None else f"map within {error:.1e} of the reference's"
    if error is not None and largest is not None:
        same += f", whose largest value is {largest:.3g}"
    return (
        f"{row['name']}: {setting(row)}, {row['frames']} frames after {row['warmup_frames']} a region, "
        f"{row['mean_points']} points, {same}; {row['weights']}"
    )


def setting(row: Mapping[str, Any]) -> str:
    """What ran where, beside what load."""
    threads = f"{row['threads']} threads" if row["threads"] else "threads unknown"
    return (
        f"{row['how']}, {row['hardware']}, {row['device']}, {threads}, load {row['load_before']:g} "
        f"before{_beside(row)}, {row['runtime']} {row['precision']}, lattice {row.get('lattice', 'all')}"
        f"{', refined' if row.get('refined') else ''}"
    )


def _beside(row: Mapping[str, Any]) -> str:
    count = row.get("beside", 0)
    return f", beside {count:g} busy {'process' if count == 1 else 'processes'}" if count else ""


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
                    [metric.replace("_", " "), *(_number(found, metric) for found in kinds.values())]
                    for metric in result["metrics"]
                ),
            ],
            [note, *([_unmarked(result)] if result.get("without_mask") else [])],
        )
    ]
    if "score_maps" in result:
        tables.append(
            Table(
                "Each score map alone",
                ["map", "image auroc", "pixel auroc"],
                [
                    [name, _number(m, "image_auroc"), _number(m, "pixel_auroc")]
                    for name, m in result["score_maps"].items()
                ],
            )
        )
    return tables


def _number(found: Mapping[str, float], metric: str) -> str:
    return f"{found[metric]:.4f}" if metric in found else ""


def _unmarked(result: Mapping[str, Any]) -> str:
    told = ", ".join(
        f"{count} of {result['per_defect'][kind]['frames']} frames of `{kind}`"
        for kind, count in result["without_mask"].items()
    )
    return f"no mask marks a defect on {told}; metrics by pixel leave them out"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

"""The robustness report as a page and as a picture."""

from pathlib import Path
from typing import Any

from m3ad.atomic import file_beside
from m3ad.bundle import write_json


def save_report(report: dict[str, Any], path: Path) -> list[Path]:
    """Write `path`.json, `path`.md and `path`.png."""
    files = [path.with_suffix(suffix) for suffix in (".json", ".md", ".png")]
    write_json(files[0], report)
    with file_beside(files[1]) as temporary:
        temporary.write_text(markdown(report), encoding="utf-8")
    _save_plot(report, files[2])
    return files


def markdown(report: dict[str, Any]) -> str:
    """The report as a page: the limits in words, then every level."""
    bundle, frames = report["bundle"], report["frames"]
    graphs, seen = (
        bundle["onnx_sha256"][:16],
        f"{frames['good']} good and {frames['defective']} defective frames",
    )
    lines = [
        f"# Robustness of {bundle['category']}",
        "",
        f"{bundle['method']}, {bundle['precision']}; {bundle['weights']}; graphs {graphs}; threshold "
        f"{report['threshold']:.6g}; {seen}. A level holds when no more defects are missed than undisturbed, no more "
        "good parts called and no more frames refused, and image AUROC is at most "
        f"{report['auroc_drop']:g} lower. Only the levels below were tried.",
        "",
        *(f"- {each['told']}" for each in report["disturbances"]),
        "",
        "| disturbance | level | image AUROC | missed | false alarms | refused |",
        "|---|---|---|---|---|---|",
        _row("none", "", report["undisturbed"]),
    ]
    for each in report["disturbances"]:
        lines += [_row(each["name"], f"{level['level']:g} {each['unit']}", level) for level in each["levels"]]
    return "\n".join([*lines, ""])


def _row(name: str, level: str, found: dict[str, Any]) -> str:
    auroc = "" if found["image_auroc"] is None else f"{found['image_auroc']:.3f}"
    return (
        f"| {name} | {level} | {auroc} | {found['missed']} | {found['false_alarms']} | {found['refused']} |"
    )


def _save_plot(report: dict[str, Any], path: Path) -> None:
    """A panel for each disturbance: image AUROC as a line, shares of missed and falsely called parts as bars."""
    from matplotlib.figure import Figure

    kinds, frames, base = report["disturbances"], report["frames"], report["undisturbed"]
    columns = min(len(kinds), 5)
    rows = -(-len(kinds) // columns)
    figure = Figure(figsize=(2.6 * columns, 2.5 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for panel, each in zip(panels, kinds, strict=False):
        levels = [base, *each["levels"]]
        at = range(len(levels))
        panel.bar(
            [i - 0.2 for i in at], [x["missed"] / frames["defective"] for x in levels], 0.4, label="missed"
        )
        alarms = [x["false_alarms"] / frames["good"] for x in levels]
        panel.bar([i + 0.2 for i in at], alarms, 0.4, label="false alarms")
        auroc = [float("nan") if x["image_auroc"] is None else x["image_auroc"] for x in levels]
        panel.plot(at, auroc, "ko-", markersize=3, label="image AUROC")
        panel.set_xticks(at, ["none", *(f"{x['level']:g}" for x in each["levels"])])
        panel.set_title(each["name"], fontsize=9)
        panel.set_xlabel(each["unit"], fontsize=8)
        panel.set_ylim(0, 1.05)
    for panel in panels[len(kinds) :]:
        panel.set_visible(False)
    panels[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)

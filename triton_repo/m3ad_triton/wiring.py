"""An ensemble's wiring, checked without a server as Triton's core does: a fault is a sentence that names both sides."""

from typing import Any

from m3ad_triton import config


def ensemble_problems(ensemble: Any, configs: dict[str, Any]) -> list[str]:
    """Check an ensemble's wiring: every model there, every input fed once, both ends of a value alike, no cycle."""
    problems: list[str] = []
    producers: dict[str, tuple[str, Any]] = {
        t.name: (f"ensemble `{ensemble.name}`", t) for t in ensemble.input
    }
    consumers: list[tuple[str, str, Any]] = []  # value, who, tensor
    edges: list[tuple[set[str], set[str]]] = []  # values a step needs and makes
    for step in ensemble.ensemble_scheduling.step:
        who, model = f"model `{step.model_name}`", configs.get(step.model_name)
        edges.append((set(step.input_map.values()), set(step.output_map.values())))
        if model is None:
            problems.append(f"ensemble `{ensemble.name}` uses {who}, which is not in the repository")
            continue
        for kind, tensors, mapped in (
            ("input", model.input, step.input_map),
            ("output", model.output, step.output_map),
        ):
            names = {t.name for t in tensors}
            problems += [
                f"ensemble `{ensemble.name}` maps {kind} `{name}` of {who}, which has only {sorted(names)}"
                for name in sorted(mapped.keys() - names)
            ]
        for tensor in model.input:
            if tensor.name not in step.input_map:
                problems.append(f"ensemble `{ensemble.name}` maps nothing to input `{tensor.name}` of {who}")
            else:
                consumers.append((step.input_map[tensor.name], who, tensor))
        for tensor in model.output:
            value = step.output_map.get(tensor.name)
            if value in producers:
                problems.append(f"value `{value}` is written by {producers[value][0]} and again by {who}")
            elif value:
                producers[value] = (who, tensor)
    consumers += [(t.name, f"ensemble `{ensemble.name}`", t) for t in ensemble.output]
    for value, who, tensor in consumers:
        if value not in producers:
            problems.append(f"value `{value}`, which {who} reads as `{tensor.name}`, is written by nobody")
            continue
        writer, written = producers[value]
        if not _agree(written, tensor):
            problems.append(
                f"value `{value}` leaves {writer} as {_describe(written)} but {who} reads `{tensor.name}` "
                f"as {_describe(tensor)}"
            )
    read = {value for value, _, _ in consumers}
    problems += [
        f"input `{t.name}` of ensemble `{ensemble.name}` is read by no model"
        for t in ensemble.input
        if t.name not in read
    ]
    if stuck := _cycle(edges, {t.name for t in ensemble.input}, producers.keys()):
        problems.append(f"the values {stuck} of ensemble `{ensemble.name}` wait for each other in a cycle")
    return problems


def _cycle(edges: list[tuple[set[str], set[str]]], ready: set[str], written: Any) -> list[str]:
    """Values that never become ready although somebody writes them."""
    waiting = [(needs & set(written), makes) for needs, makes in edges]
    while done := [entry for entry in waiting if entry[0] <= ready]:
        waiting = [entry for entry in waiting if entry not in done]
        ready = ready.union(*(makes for _, makes in done))
    return sorted({value for _, makes in waiting for value in makes})


def _agree(a: Any, b: Any) -> bool:
    """Alike as Triton's core sees it: same dtype and rank, a dimension of -1 fits every other."""
    dims = len(a.dims) == len(b.dims) and all(
        x == y or -1 in (x, y) for x, y in zip(a.dims, b.dims, strict=True)
    )
    return bool(dims and a.data_type == b.data_type)


def _describe(tensor: Any) -> str:
    return spell((tensor.data_type, list(tensor.dims)))


def spell(kind: tuple[int, list[int]] | None) -> str:
    """A tensor's type and dimensions in words."""
    return "absent" if kind is None else f"{config.dtype_name(kind[0])} {kind[1]}"

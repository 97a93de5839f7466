"""What chips exchange in one step, read from a compiled program's text.

An asynchronous collective is written several times under one channel: each channel counts once, with its bytes on one
chip after the operation, times the turns of the loops it stands in.
"""

import collections
import re

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
BITS = {
    **{f"{sign}{bits}": bits for sign in "su" for bits in (2, 4, 8, 16, 32, 64)},
    **dict.fromkeys(("f16", "bf16"), 16),
    **dict(pred=8, f32=32, f64=64),
}
SHAPE = re.compile(r"\b(pred|bf16|f8\w*|[fsu]\d+)\[([\d,]*)\]")
HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
LOOP = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
CALLS = re.compile(r"(?:calls|to_apply|called_computations|branch_computations)=\{?([^}\s]*)")
OPERATION = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")


def count(text: str) -> dict[str, dict[str, int]]:
    """{kind: {count, bytes}} of one run of a compiled program (`compiled.as_text()`), for one chip."""
    found: dict[str, dict[str, int]] = {}
    for kind, size, turns, _ in operations(text):
        entry = found.setdefault(kind, {"count": 0, "bytes": 0})
        entry["count"] += turns
        entry["bytes"] += size * turns
    return found


def operations(text: str) -> list[tuple[str, int, int, str]]:
    """(kind, bytes, how often, result's shape) of every collective."""
    parts, entry = computations(text)
    often = turns(parts, entry)
    seen: dict[tuple[str, str], tuple[int, int, str]] = {}
    for name, lines in parts.items():
        for line in lines if often[name] else ():
            match = OPERATION.search(line)
            if not match:
                continue
            result, kind, started = match.groups()
            shapes = SHAPE.findall(result)
            # Where an operation is only started its result is (operands, results, …).
            if started and len(shapes) > 1:
                shapes = shapes[:1] if kind == "collective-permute" else shapes[len(shapes) // 2 :]
            channel = re.search(r"channel_id=(\d+)", line)
            key = (kind, channel[1] if channel else f"{name} {line[:40]}")
            if key not in seen or often[name] > seen[key][1]:
                seen[key] = (sum(size_of(*shape) for shape in shapes), often[name], result[:80])
    return [(kind, *value) for (kind, _), value in seen.items()]


def size_of(dtype: str, dims: str) -> int:
    """Bytes of an array."""
    n = 1
    for size in filter(None, dims.split(",")):
        n *= int(size)
    return n * BITS.get(dtype, 8) // 8


def computations(text: str) -> tuple[dict[str, list[str]], str]:
    """({name: lines}, the entry's name)."""
    parts: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        match = HEAD.match(line)
        if match:
            name = match[2]
            parts[name] = []
            entry = name if match[1] else entry
        elif name:
            parts[name].append(line)
    return parts, entry


def turns(parts: dict[str, list[str]], entry: str) -> collections.Counter[str]:
    """How often each computation runs."""
    often: collections.Counter[str] = collections.Counter()
    waiting = [(entry, 1)]
    while waiting:
        name, times = waiting.pop()
        often[name] += times
        for line in parts.get(name, ()):
            loop = LOOP.search(line)
            if loop:
                waiting.append((loop[2], times * _trips(parts, line, loop[1])))
                continue
            for names in CALLS.findall(line):
                waiting += [(n, times) for n in re.findall(r"[\w.\-]+", names) if n in parts]
    return often


def _trips(parts: dict[str, list[str]], line: str, condition: str) -> int:
    """Of a loop: what the compiler wrote beside it, or the number that its counter is compared with."""
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
    if known:
        return int(known[1])
    lines = list(parts.get(condition, ()))
    for called in re.findall(r"calls=%?([\w.\-]+)", "\n".join(lines)):
        lines += parts.get(called, ())
    return max((int(n) for n in re.findall(r"constant\((\d+)\)", "\n".join(lines))), default=1)

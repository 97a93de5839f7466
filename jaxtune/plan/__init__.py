"""Does it fit, on which chips, and how fast: answered from shapes (`memory`, `flops`, `roofline`), or by the compiler
of a chip that is not here (`compile`).

    python -m jaxtune.plan --config configs/gemma_lora.py --chip v5e --chips 8
"""

from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    from jaxtune.plan import command

    return command.main(argv)

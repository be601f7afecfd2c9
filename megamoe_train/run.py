"""`python -m megamoe_train.run SCRIPT.py [arguments]`: an unmodified Megatron training script, with megamoe installed.

Everything the script does stays its own; `--moe-dispatcher megamoe` turns the layer on. Under torchrun:
`torchrun --nproc-per-node 2 -m megamoe_train.run pretrain_gpt.py ... --moe-dispatcher megamoe`.
"""

import os
import runpy
import sys

USAGE = "usage: python -m megamoe_train.run SCRIPT.py [the script's arguments]"


def main(argv: list[str]) -> None:
    """`argv`: the script, then its arguments. It runs as `__main__` with its own sys.argv and sys.path[0]."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{__doc__}\n{USAGE}")
        sys.exit(0 if argv else 2)
    script = argv[0]
    if not os.path.isfile(script):
        sys.exit(f"megamoe_train.run: no such script: {script}\n{USAGE}")
    from megamoe_train.megatron.install import install

    install()
    sys.argv = list(argv)
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])

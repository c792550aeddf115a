"""``python -m deltasam_plugin.report RUN…``: one page about one or more runs of fairseq-train, with or without δ-SAM.

A run is the folder that ``--tensorboard-logdir`` was given. The page holds a table and figures in which the runs lie
over each other. It needs nothing outside it and can be printed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from deltasam_plugin.tools.console import BadInput, Parser, console, labels, missing

PROGRAM = "deltasam-report"


def parser() -> Parser:
    """The program's options."""
    made = Parser(PROGRAM, description="One page about runs of fairseq-train.")
    made.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="what --tensorboard-logdir was given")
    made.add_argument("--output", type=Path, default=Path("report.html"), metavar="FILE", help="default: report.html")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program.

    Raises:
        SystemExit: bad input, with one line and status 2.
    """
    given = parser().parse_args(arguments)
    with console(PROGRAM):
        if absent := missing("tensorboard", "matplotlib", "jinja2"):
            raise BadInput(f"It needs {', '.join(absent)}: pip install 'deltasam-plugin[report]'.")
        from deltasam_plugin.tools.events import read_run
        from deltasam_plugin.tools.report_figures import PANELS
        from deltasam_plugin.tools.report_page import page

        paths = [path.resolve() for path in given.runs]
        if twice := [str(path) for path in dict.fromkeys(paths) if paths.count(path) > 1]:
            raise BadInput(f"{', '.join(twice)} is given twice. Give each run once.")
        if given.output.is_dir() or not given.output.absolute().parent.is_dir():
            raise BadInput(f"--output {given.output} cannot be written. Give a file in a folder that exists.")
        runs = [read_run(path) for path in tqdm(paths, "runs", leave=False, file=sys.stderr)]
        text = page(runs, labels(paths), tqdm(PANELS, "figures", leave=False, file=sys.stderr))
        given.output.write_text(text, encoding="utf-8")
        for file in (file for run in runs for file in run.torn):
            print(f"{PROGRAM}: {file} ends in the middle of a record; what is before that is shown.", file=sys.stderr)
        print(f"{given.output}: {len(runs)} {'run' if len(runs) == 1 else 'runs'}")


if __name__ == "__main__":
    main()

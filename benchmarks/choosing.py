"""Ask with selections that are not in the package: the candidates of `benchmarks.candidates`, beside methods that are.

    python -m benchmarks.choosing --store FILE [--methods a-product scope-product adafv] [--part choose]
    python -m benchmarks.choosing photos --store FILE --model DIR --choices Yes,No \
        --suffix " Answer the question using a single word or phrase." --methods a-product adafv

The same as `adafv bench accuracy`, which knows methods that are installed alone: the same questions, answers in a file that
a run goes on from, and the same tables.
"""

import argparse
from pathlib import Path

import torch

from adafv.asking.models import checked_model
from adafv.asking.session import Session
from adafv.core import Budget
from adafv.evaluation.accuracy import PARTS, file_data, ways_of, world_data
from adafv.evaluation.accuracy_report import AccuracyReport, Scores
from adafv.evaluation.answers import Asker, Configuration
from adafv.evaluation.drawn import side_for
from adafv.evaluation.first_token import FirstTokenAsker
from adafv.evaluation.questions import Questions
from adafv.evaluation.store import Store
from adafv.methods import known_methods
from benchmarks import candidates


def ways(methods: list[str], keeps: list[str]) -> list[Configuration]:
    """Unpruned, blanked, random, and these methods and candidates at every budget."""
    # What a table calls by the name of a method is that method.
    assert not candidates.CANDIDATES.keys() & known_methods().keys()
    budgets = [Budget.of(keep) for keep in keeps]
    made = ways_of([method for method in methods if method not in candidates.CANDIDATES], budgets)
    return made + [
        Configuration(name, budget, candidates.CANDIDATES[name])
        for name in methods
        if name in candidates.CANDIDATES
        for budget in budgets
    ]


def options_of(parser: argparse.ArgumentParser, count: int) -> argparse.Namespace:
    """What is asked of whom: options that all research of this kind has in common.

    Args:
        count: of drawn questions, where nobody says.
    """
    parser.add_argument("questions", type=Path, nargs="*", help="as for `adafv bench accuracy`; none: drawn scenes")
    parser.add_argument("--store", required=True, type=Path, help="answers are read from here and added")
    parser.add_argument("--model", default="", help="default: the bundled one")
    parser.add_argument("--part", choices=PARTS, default="choose")
    parser.add_argument(
        "--count", type=int, default=0, help=f"of questions; default: {count} drawn ones, all of a file"
    )
    parser.add_argument("--choices", type=lambda text: text.split(","), help="read the answer off the logits of these")
    parser.add_argument("--suffix", default="", help="put behind every question")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--no-photos", action="store_true", help="no photographic backgrounds; they need scikit-image")
    parser.add_argument("--details", action="store_true", help="of drawn scenes: those with letters and patterns")
    parser.add_argument("--kinds", action="store_true", help="by kind of question as well")
    options = parser.parse_args()
    options.drawn = options.count or count
    return options


def loaded(options: argparse.Namespace) -> Session:
    torch.set_num_threads(1)
    return Session.load(checked_model(options.model), "float32", torch.device("cpu"))


def answer(asker: Asker, asked: list[Configuration], options: argparse.Namespace, against: list[str]) -> None:
    """Ask what the store lacks, and print the tables."""
    if options.questions:
        data = file_data(options.questions, options.part, options.count)
    else:
        side = side_for(asker.session.model)
        data = world_data(options.drawn, side, options.part, photos=not options.no_photos, detailed=options.details)
    with Store(options.store, asker.fingerprint()) as store:
        _, keys = asker.run(
            Questions(data.questions, []),
            asked,
            store,
            batch=options.batch,
            progress=lambda state: print(f"{state.done} of {state.total} answers", flush=True),
        )
        scores = Scores(data, asked, store, keys, rule=data.rule or "auto")
        name = checked_model(options.model)
        report = AccuracyReport(name, [scores], against, options.part, options.kinds, {}, {"suffix": options.suffix})
        print(report.markdown({}))


def main() -> None:
    parser = argparse.ArgumentParser(description="Selections that are not in the package, question by question.")
    parser.add_argument("--methods", nargs="+", default=["adafv", *candidates.CANDIDATES])
    parser.add_argument("--keep", nargs="+", default=["25%", "10%", "5%"])
    parser.add_argument("--against", nargs="*", default=["adafv", "random"])
    options = options_of(parser, 2000)
    session = loaded(options)
    candidates.LANGUAGE_MODEL = session.model.model.language_model
    asker = FirstTokenAsker(session, choices=options.choices, suffix=options.suffix)
    answer(asker, ways(options.methods, options.keep), options, options.against)


if __name__ == "__main__":
    main()

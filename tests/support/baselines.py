"""Fine-tuning on a stream, to compare methods with: learnt once in a session, whatever test or process asks first."""

from collections.abc import Mapping
from typing import Any

from cl_lightning.measures import AccuracyMatrix
from cl_lightning.strategies.baselines.finetune import Finetune
from support.runs import run
from support.shared import made_once, words


def finetuning(strategy: Mapping[str, Any], /, **options: Any) -> AccuracyMatrix:
    """Accuracies of fine-tuning, as ``run(Finetune(**strategy), **options).matrix``.

    Args:
        strategy: Options of the strategy; factories have a name (no lambda), so that they can be compared.
        options: Of :func:`support.runs.run`: data, epochs, ....
    """
    name = f"finetuning {words(strategy)} {words(options)}"
    matrix = AccuracyMatrix()
    matrix.load_state_dict(made_once(name, lambda: run(Finetune(**strategy), **options).matrix.state_dict()))
    return matrix

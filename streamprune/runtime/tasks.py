"""Scores in tasks of lm-evaluation-harness, which is imported when it is used."""

import logging
import math
from pathlib import Path
from typing import Any

from streamprune.config import PathLike, path_of
from streamprune.errors import NumericsError, SettingsError
from streamprune.model.arithmetic import Arithmetic
from streamprune.model.configuration import one_line
from streamprune.model.source import Source
from streamprune.text.tokenizers import load_tokenizer

BATCH = 8  # sequences at once
PLAIN = ",none"  # ends the name of a metric whose answers pass no filter


def check_harness(tasks: PathLike) -> Path:
    """The file of tasks. Raises SettingsError where it is missing, or lm-evaluation-harness is."""
    file = path_of("tasks", tasks)
    if not file.is_file() or file.suffix != ".yaml":
        raise SettingsError(f"tasks {file}: is no .yaml file of lm-evaluation-harness")
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise SettingsError('tasks need lm-evaluation-harness: pip install "streamprune[eval]"') from error
    return file


def run_tasks(source: Source, file: Path, arithmetic: Arithmetic) -> dict[str, dict[str, float]]:
    """Metrics by task: {"endings": {"acc": 0.75, "acc_stderr": 0.04}}; all that are numbers, by the harness's names.

    The model is held in memory as transformers loads it: an output's pruned layers stay packed. A file may name Python
    functions, which run. Raises SettingsError for a file that the harness does not take, NumericsError where the model
    gives NaN.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        tasks = TaskManager(include_defaults=False).load(str(file.absolute()))["tasks"]
    except Exception as error:
        raise SettingsError(f"{file}: lm-evaluation-harness does not take it ({one_line(error)})") from error
    tokenizer = load_tokenizer(source.folder)
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise SettingsError(f"{source.folder}: its tokenizer has no bos_token and no eos_token, and tasks need one")
    model = HFLM(_loaded(source, arithmetic), tokenizer=tokenizer, batch_size=BATCH)
    results = lm_eval.simple_evaluate(model, tasks=[*tasks.values()])
    answers = (answer for samples in results["samples"].values() for one in samples for answer in one["filtered_resps"])
    if any(isinstance(answer, tuple) and math.isnan(answer[0]) for answer in answers):
        raise NumericsError(f"{source.folder}: the model gives NaN in {file.name}; give --dtype float32")
    return {task: _numbers(metrics) for task, metrics in results["results"].items()}


def _loaded(source: Source, arithmetic: Arithmetic) -> Any:
    from streamprune.integrations.huggingface import load
    from streamprune.model.library import auto_class

    if source.packed:
        return load(source.folder, device=arithmetic.device, dtype=arithmetic.dtype)
    settings = {"dtype": arithmetic.dtype, "device_map": arithmetic.device}
    return auto_class(type(source.skeleton.model.config)).from_pretrained(source.folder, **settings)


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """The scores among what the harness says of a task, and their standard errors."""
    return {
        name.removesuffix(PLAIN): float(value)
        for name, value in metrics.items()
        if "," in name and isinstance(value, int | float)
    }

import warnings

import pytest
from lightning.pytorch import Callback
from support.runs import StopAt, loop, plain_net, sgd

from cl_lightning.loop import warning_filters
from cl_lightning.loop.warning_filters import ignore_lightning_warnings
from cl_lightning.strategies.exemplar_free.lwf import LwF


class Warns(Callback):
    def on_train_start(self, trainer, pl_module):
        warnings.warn("a warning of the user's own", stacklevel=2)


def lwf():
    return LwF(backbone=plain_net, optimizer=sgd)


def stopped_resumed_tested(folder):
    """A run that crashes within an epoch of task 1, is resumed there to its end, and is tested."""
    saving = {"save_every_n_steps": 2, "save_every_seconds": 0.0}
    with pytest.raises(StopAt.CrashError):
        loop(lwf(), StopAt(1, 4), folder=folder, options=saving, log_every_n_steps=50).fit()
    loop(lwf(), folder=folder, log_every_n_steps=50).fit("last")
    loop(lwf(), folder=folder).test("last")


def test_lightning_warns_of_each_of_them_without_the_filters(tmp_path, monkeypatch):
    monkeypatch.setattr(warning_filters, "MESSAGES", ())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stopped_resumed_tested(tmp_path)
    text = "\n".join(str(warning.message) for warning in caught)
    for words in ("in eval mode", "not resumable", "ranks is zero", "smaller than the logging", "LeafSpec"):
        assert words in text


def test_a_run_raises_none_of_them_where_every_warning_is_an_error(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stopped_resumed_tested(tmp_path)


def test_validation_raises_none_of_them_either(tmp_path):
    data = {"val_fraction": 0.2}
    loop(lwf(), folder=tmp_path, data=data, max_epochs=1).fit()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop(lwf(), folder=tmp_path, data=data).validate("last")


def test_a_warning_of_the_users_own_code_still_comes_through():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="the user's own"):
            loop(lwf(), Warns()).fit()


def test_the_filters_end_with_the_context():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ignore_lightning_warnings():
            warnings.warn("Found 3 module(s) in eval mode at the start of training.", stacklevel=1)
        with pytest.raises(UserWarning, match="in eval mode"):
            warnings.warn("Found 3 module(s) in eval mode at the start of training.", stacklevel=1)

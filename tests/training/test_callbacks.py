"""Code of others in a run: called at the right moments with the run's numbers; an error of it ends all ranks."""

import functools
import signal

import pytest

from megatron_moe_lpr import Callback, UserError
from megatron_moe_lpr.pretrain import pretrain
from megatron_moe_lpr.training.callbacks import CallbackError, check_callbacks
from megatron_moe_lpr.training.signals import stop_request
from tests.distributed import rank_pool
from tests.training.runs import make_checkpoint, make_data, metrics, training_config

RANKS = 2
OPTIONS = {"train_iters": 6, "micro_batch_size": 4, "save_interval": 2, "eval_interval": 4, "log_interval": 2}
HOOKS = ("on_start", "on_step", "on_evaluation", "on_save", "on_end")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("callbacks")
    checkpoint, data = make_checkpoint(root), make_data(root)
    return checkpoint, data, OPTIONS | {"valid_data_path": [data["el"]]}


def run(inputs, save, job, *arguments, **changes) -> list:
    checkpoint, data, options = inputs
    return rank_pool(RANKS).run(functools.partial(job, *arguments, checkpoint, save, data, **options | changes))


class Recorder(Callback):
    """Notes each call; one rank gets a signal in step `stop_at`."""

    def __init__(self, stop_at: int | None) -> None:
        self.stop_at, self.calls, self.steps, self.losses = stop_at, [], {}, {}

    def on_start(self, config, iteration):
        self.calls.append(("start", iteration))
        assert config.batch.train_iters == OPTIONS["train_iters"]

    def on_step(self, step):
        import torch.distributed as dist

        self.calls.append(("step", step.iteration))
        self.steps[step.iteration] = {
            "loss": step.loss,
            "languages": step.language_losses,
            "lr": step.lr,
            "grad_norm": step.grad_norm,
            "tokens": step.consumed_tokens,
            "skipped": step.skipped,
            "metrics": step.metrics and step.metrics.scalars()["lm_loss"],
        }
        if step.iteration == self.stop_at and dist.get_rank() == RANKS - 1:
            stop_request().received = signal.SIGTERM

    def on_evaluation(self, iteration, result):
        self.calls.append(("evaluation", iteration))
        self.losses[iteration] = result.loss

    def on_save(self, saved):
        assert (saved.path / "metadata.json").is_file()
        self.calls.append(("save", saved.iteration))

    def on_end(self, iteration, finished):
        self.calls.append(("end", iteration, finished))


def recorded(stop_at, *arguments, **changes):
    recorder = Recorder(stop_at)
    try:
        pretrain(training_config(*arguments, **changes), [recorder])
    finally:
        stop_request().received = None
    return recorder.calls, recorder.steps, recorder.losses


def test_each_hook_is_called_at_its_moment_over_a_stop_and_a_resume(inputs, tmp_path):
    """The numbers are those of the log, and the same on both ranks."""
    save = tmp_path / "run"
    first, second, third = (run(inputs, save, recorded, stop, async_save=False) for stop in (1, None, None))
    assert first[0] == first[1] and second[0] == second[1] and third[0] == third[1]
    assert first[0][0] == [("start", 0), ("step", 1), ("step", 2), ("save", 2), ("end", 2, False)]
    until_4 = [("start", 2), ("step", 3), ("step", 4), ("save", 4), ("evaluation", 4)]
    until_6 = [("step", 5), ("step", 6), ("save", 6), ("evaluation", 6), ("end", 6, True)]
    assert second[0][0] == until_4 + until_6
    assert third[0][0] == [("start", 6), ("end", 6, True)]
    steps, log = first[0][1] | second[0][1], metrics(save)
    assert sorted(log) == [2, 4, 6]
    for number, record in log.items():
        before, step = steps[number - 1], steps[number]
        assert before["metrics"] is None and step["metrics"] == record["lm_loss"]
        # Each step has a global batch of the same number of tokens.
        assert (before["loss"] + step["loss"]) / 2 == pytest.approx(record["lm_loss"], rel=1e-12)
        assert (step["lr"], step["grad_norm"]) == (record["lr"], record["grad_norm"])
        assert step["tokens"] == record["consumed_tokens"] == number * 8 * 32
        assert step["languages"].keys() <= {"el", "hu"} and not step["skipped"]
        assert min(step["languages"].values()) <= step["loss"] <= max(step["languages"].values())
    logged = {number: record["lm_loss"] for number, record in metrics(save, "valid/el").items()}
    assert second[0][2] == logged


def error_of(hook: str, error: Exception, given_to_all: bool, *arguments, **changes) -> tuple[str, str] | None:
    """Train with a callback that raises on the last rank; the kind and text of what ends this rank."""
    import torch.distributed as dist

    def raising(self, *values):
        if dist.get_rank() == RANKS - 1:
            raise error

    callback = type("Raising", (Callback,), {hook: raising})()
    callbacks = [callback] if given_to_all or dist.get_rank() == RANKS - 1 else []
    try:
        pretrain(training_config(*arguments, **changes), callbacks)
    except Exception as found:
        return type(found).__name__, str(found)
    return None


@pytest.mark.parametrize(
    ("hook", "given_to_all"), [*((hook, True) for hook in HOOKS), ("on_step", False), ("on_save", False)]
)
def test_an_error_on_one_rank_ends_all(hook, given_to_all, inputs, tmp_path):
    """With a save beside training, which may be completed in an evaluation; also where one rank alone has callbacks."""
    save, changes = tmp_path / "run", {"train_iters": 2, "eval_interval": 2, "async_save": given_to_all}
    other, failed = run(inputs, save, error_of, hook, ValueError("planted"), given_to_all, **changes)
    assert failed == ("ValueError", "planted")
    assert other[0] == CallbackError.__name__ and other[1].startswith(f"on rank {RANKS - 1}:\nTraceback")
    assert "in raising" in other[1] and other[1].endswith("ValueError: planted\n")
    # A step is not saved once a callback has raised; what was complete before stays.
    assert [path.name for path in save.glob("*iter_*")] == (["iter_0000002"] if HOOKS.index(hook) > 1 else [])
    assert not (save / "run.lock").exists()


def test_an_error_in_a_step_ends_all_within_the_next_one(inputs, tmp_path):
    changes = {"train_iters": 4, "save_interval": None, "eval_interval": None, "log_interval": 1}
    found = run(inputs, tmp_path / "run", error_of, "on_step", UserError("bad: mend it"), True, **changes)
    assert found == [("UserError", "bad: mend it")] * RANKS
    assert sorted(metrics(tmp_path / "run")) == [1]


@pytest.mark.parametrize("given", [Callback, print, None])
def test_what_is_no_callback_is_refused(given):
    with pytest.raises(UserError, match=r"callbacks: .* an instance of a moe_lpr.Callback is expected"):
        check_callbacks([Callback(), given])

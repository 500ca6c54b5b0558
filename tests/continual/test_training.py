"""Sequential training: nothing is forgotten, to the last bit, and nothing global is touched."""

import random

import numpy as np
import pytest
import torch

from nmkern.continual import metrics
from nmkern.continual.datasets import digits
from nmkern.continual.tasks import make_tasks
from nmkern.continual.training import EpochDone, TaskDone, evaluate, train_sequence
from nmkern.models import FlyNet
from nmkern.nn import finish_context

TASKS, EPOCHS = 3, 2


def network(contexts=TASKS, seed=0):
    return FlyNet(64, 10, width_multiple=4, contexts=contexts, seed=seed)


@pytest.fixture(scope="module")
def tasks():
    return make_tasks("rotated", digits(), TASKS)


@pytest.fixture(scope="module")
def run(tasks):
    """A trained model, what training it yielded, and global random state before and after."""

    def state():
        return torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002

    model, before = network(), state()
    events = list(train_sequence(model, tasks, epochs=EPOCHS, seed=7))
    return model, events, before, state()


def rows(events):
    return [event for event in events if isinstance(event, TaskDone)]


def test_events_come_in_order(run):
    _, events, _, _ = run
    order = [
        (event.task, event.epoch) if isinstance(event, EpochDone) else (event.task, "done")
        for event in events
    ]
    assert order == [(task, step) for task in range(TASKS) for step in (*range(EPOCHS), "done")]
    assert all(event.seconds > 0 for event in rows(events))


def test_training_lowers_the_loss_and_learns(run):
    _, events, _, _ = run
    for task in range(TASKS):
        losses = [e.loss for e in events if isinstance(e, EpochDone) and e.task == task]
        assert losses[-1] < losses[0]
    assert min(rows(events)[-1].accuracies) > 0.4  # chance is 0.1


def test_no_accuracy_and_no_logit_ever_changes(run):
    _, events, _, _ = run
    for task in range(TASKS):
        seen = rows(events)[task:]
        assert len({row.accuracies[task] for row in seen}) == 1
        assert len({row.hashes[task] for row in seen}) == 1
    matrix = [[*row.accuracies, *[None] * (TASKS - 1 - row.task)] for row in rows(events)]
    assert metrics.forgetting(matrix) == 0.0


def test_contexts_are_finished(run):
    model, _, _, _ = run
    assert not list(model.parameters())


def test_evaluate_repeats_the_last_row(run, tasks):
    model, events, _, _ = run
    assert evaluate(model, tasks) == (rows(events)[-1].accuracies, rows(events)[-1].hashes)


def test_hashes_tell_altered_contexts_apart(run, tasks):
    model, events, _, _ = run
    altered = network()
    altered.load_state_dict(model.state_dict())
    altered.decoder.context(1).in_gain[3] += 1e-3
    _, hashes = evaluate(altered, tasks)
    same = [a == b for a, b in zip(hashes, rows(events)[-1].hashes, strict=True)]
    assert same == [True, False, True]


def test_global_random_state_is_untouched(run):
    _, _, before, after = run
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]
    assert np.array_equal(before[2], after[2])


def test_seed_and_task_set_the_order_of_batches(run, tasks):
    _, events, _, _ = run
    again, other = (
        rows(train_sequence(network(), tasks[:2], epochs=EPOCHS, seed=seed))[-1].hashes for seed in (7, 8)
    )
    assert again == rows(events)[1].hashes
    assert other[0] != again[0] and other[1] != again[1]


def test_bad_arguments_are_refused_before_training(tasks):
    with pytest.raises(ValueError, match="epochs: expected at least 1, got 0"):
        train_sequence(network(), tasks, epochs=0)
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        train_sequence(network(), tasks, epochs=1, batch_size=0)
    with pytest.raises(ValueError, match="model: expected a context for each of 3 tasks, got 2"):
        train_sequence(network(contexts=2), tasks, epochs=1)
    finished = network()
    finish_context(finished, 1)
    with pytest.raises(ValueError, match=r"model: .*got finished ones: \[1\]"):
        train_sequence(finished, tasks, epochs=1)

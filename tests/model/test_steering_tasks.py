"""Steering contexts belong to their task: asyncio, threads, generators, and exits in any order."""

import asyncio
import threading
from contextlib import ExitStack

import pytest
import torch
from conftest import make_base, make_mfn, tokens

from modeling_mfn import Add, Clamp, Scale

BATCH = tokens(2, 6)


@pytest.fixture(scope="module")
def model():
    return make_mfn(make_base("llama-tied").double())


def activation(model, feature=3):
    """Activations (2, 6) of a feature of block 0, as the model gives them here and now."""
    with torch.no_grad():
        return model(**BATCH, output_codes=True).codes[0].to_dense()[..., feature]


def test_two_tasks_of_one_thread_do_not_steer_each_other(model):
    async def work(value, ready, go):
        with model.steer({(0, 3): Clamp(value)}):
            ready.set()
            await go.wait()  # by now the other task has entered its own context
            return activation(model)

    async def both():
        plain = activation(model)
        events = [asyncio.Event() for _ in range(2)]
        first = asyncio.create_task(work(1.0, *events))
        second = asyncio.create_task(work(9.0, *events[::-1]))
        found = await asyncio.gather(first, second)
        assert torch.equal(activation(model), plain)
        return found

    low, high = asyncio.run(both())
    assert (low == 1.0).all()
    assert (high == 9.0).all()


def test_tasks_and_threads_that_asyncio_starts_inside_are_steered(model):
    async def inside():
        with model.steer({(0, 3): Clamp(2.0)}):
            of_task = asyncio.create_task(asyncio.to_thread(activation, model))
        return await of_task  # begun inside, though it may end outside

    assert (asyncio.run(inside()) == 2.0).all()
    found = []
    with model.steer({(0, 3): Clamp(2.0)}):
        thread = threading.Thread(target=lambda: found.append(activation(model)))
        thread.start()
        thread.join()
    assert torch.equal(found[0], activation(model))  # a plain thread enters its own contexts


def test_contexts_left_in_another_order_compose_what_is_left(model):
    plain = activation(model)
    first, second, third = (model.steer({(0, 3): each}) for each in (Add(2.0), Scale(3.0), Add(0.5)))
    for context in (first, second, third):
        context.__enter__()
    torch.testing.assert_close(activation(model), 3 * (plain + 2) + 0.5)
    first.__exit__(None, None, None)
    torch.testing.assert_close(activation(model), 3 * plain + 0.5)
    third.__exit__(None, None, None)
    torch.testing.assert_close(activation(model), 3 * plain)
    second.__exit__(None, None, None)
    assert torch.equal(activation(model), plain)


def test_a_generator_that_is_closed_late_takes_its_own_context_away(model):
    def steered():
        with model.steer({(0, 3): Clamp(7.0)}):
            yield

    plain, waiting = activation(model), steered()
    next(waiting)
    with model.steer({(0, 5): Clamp(4.0)}):
        waiting.close()
        assert torch.equal(activation(model), plain)
        assert (activation(model, 5) == 4.0).all()
    assert torch.equal(activation(model, 5), activation(model, 5))
    with ExitStack() as stack:
        stack.enter_context(model.steer({(0, 3): Clamp(7.0)}))
        assert (activation(model) == 7.0).all()
    assert torch.equal(activation(model), plain)


@pytest.mark.slow
def test_a_compiled_model_follows_one_task_or_says_so(model):
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")

    def logits():
        with torch.no_grad():
            return compiled(**BATCH).logits

    async def nested():
        with model.steer({(0, 3): Clamp(5.0)}):
            return logits(), model(**BATCH).logits.detach()

    with model.steer({(0, 5): Clamp(2.0)}):
        torch.testing.assert_close(*asyncio.run(nested()))

    async def wait(entered, go):
        with model.steer({(0, 3): Clamp(1.0)}):
            entered.set()
            await go.wait()

    async def mixed():
        entered, go = asyncio.Event(), asyncio.Event()
        other = asyncio.create_task(wait(entered, go))
        await entered.wait()
        with model.steer({(0, 3): Clamp(9.0)}), pytest.raises(Exception, match="two asyncio tasks steer in one thread"):
            logits()
        go.set()
        await other

    asyncio.run(mixed())
    torch.testing.assert_close(logits(), model(**BATCH).logits.detach())


@pytest.mark.slow
def test_a_compiled_model_in_another_thread_is_steered_there_or_says_so(model):
    torch._dynamo.reset()
    other = make_mfn(make_base("gpt2-tied").double())
    compiled, of_other = (torch.compile(each, fullgraph=True, backend="eager") for each in (model, other))

    def logits(forward, interventions=None):
        with torch.no_grad():
            if interventions is None:
                return forward(**BATCH).logits
            with model.steer(interventions):
                return forward(**BATCH).logits

    async def inside():
        plain = await asyncio.to_thread(logits, compiled)
        torch.testing.assert_close(plain, logits(model))
        with model.steer({(0, 3): Clamp(5.0)}):
            expected = logits(model)
            torch.testing.assert_close(await asyncio.to_thread(logits, model), expected)
            with pytest.raises(Exception, match="steered in another thread"):
                await asyncio.to_thread(logits, compiled)
            torch.testing.assert_close(await asyncio.to_thread(logits, compiled, {}), expected)
            torch.testing.assert_close(logits(compiled), expected)
            torch.testing.assert_close(await asyncio.to_thread(logits, of_other), logits(other))
        torch.testing.assert_close(await asyncio.to_thread(logits, compiled), plain)

    asyncio.run(inside())


def test_continuous_batching_is_refused_inside_a_context(model):
    with model.steer({(0, 3): Clamp(1.0)}), pytest.raises(ValueError, match="a thread of its own"):
        model.generate_batch(inputs=[[3, 4, 5]])


def test_a_context_is_left_where_it_was_entered(model):
    plain, context, errors = activation(model), model.steer({(0, 3): Clamp(5.0)}), []

    def leave():
        try:
            context.__exit__(None, None, None)
        except ValueError as error:
            errors.append(error)

    leave()
    context.__enter__()
    thread = threading.Thread(target=leave)
    thread.start()
    thread.join()
    assert [str(error) for error in errors] == [
        "this context was not entered in this thread; leave it where it was entered"
    ] * 2
    assert not torch.equal(activation(model), plain)
    leave()
    assert torch.equal(activation(model), plain)

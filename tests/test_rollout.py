"""Sampling and the rollout's weights, without Ray."""

import asyncio
import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from tensordict import NonTensorData, TensorDict

from mxfp4_rl.generation import Sampling, _draw, generate
from mxfp4_rl.nn import convert, converted_layers
from mxfp4_rl.noise import AQNSchedule
from mxfp4_rl.quant import quantize
from mxfp4_rl.settings import Settings
from mxfp4_rl.tasks.tiny_model import make_tiny_model
from mxfp4_rl.verl_plugin import waves
from mxfp4_rl.verl_plugin.rollout import MXFP4Server, RolloutModel, stop_token_ids
from mxfp4_rl.verl_plugin.waves import Waiting
from tests.test_nn import llama

SETTINGS = Settings.from_config({"enable": True, "recipe": {"macro_block": "static", "fallback_alpha": 0.5}})


def full_log_probs(model, prompt, tokens, warper=None):
    ids = torch.tensor([prompt + tokens])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
    if warper:
        logits = warper(None, logits)
    return logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None]).squeeze(-1)


@pytest.fixture(scope="module")
def model():
    return llama().eval()


def test_greedy_equals_argmax_of_full_forwards(model):
    prompts = [[1, 2, 3], [4, 5], [6, 7, 8, 9, 10]]
    out = generate(model, prompts, [6, 6, 6], [0, 0, 0], Sampling(temperature=0), {63}, 0)
    for prompt, (tokens, log_probs) in zip(prompts, out, strict=True):
        ids = list(prompt)
        for token in tokens:
            with torch.no_grad():
                assert model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item() == token
            ids.append(token)
        assert torch.tensor(log_probs) == pytest.approx(full_log_probs(model, prompt, tokens), abs=1e-4)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.7), Sampling(top_k=5), Sampling(1.3, top_p=0.8)])
def test_log_probs_are_those_of_the_sampled_distribution(model, sampling):
    ((tokens, log_probs),) = generate(model, [[1, 2, 3]], [8], [5], sampling, {63}, 0)
    expected = full_log_probs(model, [1, 2, 3], tokens, sampling.warper())
    assert torch.tensor(log_probs) == pytest.approx(expected, abs=1e-4)


def test_a_sample_depends_on_its_seed_alone(model):
    prompts = [[1, 2, 3], [4, 5], [1, 2, 3], [1, 2, 3]]
    together = generate(model, prompts, [8, 3, 8, 8], [10, 11, 12, 10], Sampling(), {63}, 0)
    for prompt, limit, seed, expected in zip(prompts, [8, 3, 8, 8], [10, 11, 12, 10], together, strict=True):
        (alone,) = generate(model, [prompt], [limit], [seed], Sampling(), {63}, 0)
        assert alone[0] == expected[0] and alone[1] == pytest.approx(expected[1], abs=1e-4)
        assert len(expected[0]) <= limit
    assert together[0][0] == together[3][0] != together[2][0]


def test_samples_follow_the_distribution(model):
    n = 3000
    out = generate(model, [[1, 2, 3]] * n, [1] * n, list(range(n)), Sampling(temperature=0.5), set(), 0)
    counts = torch.bincount(torch.tensor([tokens[0] for tokens, _ in out]), minlength=64) / n
    with torch.no_grad():
        p = (model(input_ids=torch.tensor([[1, 2, 3]])).logits[0, -1] / 0.5).softmax(-1)
    assert (counts - p).abs().max() < 5 * (p.max() / n).sqrt()


def test_a_draw_is_the_inverse_of_the_distribution_function():
    p = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    below_one = 1 - 2.0**-24
    for u, token in [(0.0, 1), (0.2499, 1), (0.2501, 3), (0.7499, 3), (0.7501, 4), (below_one, 4)]:
        assert _draw(p.log(), torch.tensor([u])).item() == token  # never one without probability


def test_logits_that_are_not_finite_are_refused(model):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        generate(broken, [[1, 2]], [4], [0], Sampling(), {63}, 0)


def test_responses_end_with_the_stop_token(model):
    n = 200
    stop = set(range(0, 64, 4))
    for tokens, log_probs in generate(model, [[1]] * n, [6] * n, list(range(n)), Sampling(), stop, 0):
        assert len(tokens) == len(log_probs) and not set(tokens[:-1]) & stop
        assert tokens[-1] in stop or len(tokens) == 6


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model", seed=0)


def rollout_model(path, settings, schedule, dtype, **kwargs):
    from transformers import AutoConfig, AutoTokenizer

    config, tokenizer = AutoConfig.from_pretrained(path, attn_implementation="sdpa"), AutoTokenizer.from_pretrained(path)
    stop_ids = stop_token_ids(tokenizer, SimpleNamespace(eos_token_id=[tokenizer.eos_token_id]))
    return RolloutModel(config, stop_ids, tokenizer.pad_token_id, settings, schedule, dtype, **kwargs)


def weights_of(path, settings=SETTINGS):
    """What an actor in BF16 would ship, and the actor."""
    from transformers import AutoModelForCausalLM

    actor = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    state = actor.state_dict()
    if settings.enable:
        convert(actor, settings.recipe)
        for name, layer in converted_layers(actor).items():
            state[f"{name}.weight"] = quantize(layer.weight, layer.recipe.weight)
    return state, actor


@pytest.mark.parametrize("enable", [True, False])
def test_rollout_model_computes_the_actors_logits(checkpoint, enable):
    settings = SETTINGS if enable else Settings()
    state, actor = weights_of(checkpoint, settings)
    rollout = rollout_model(checkpoint, settings, None, torch.bfloat16)
    size = rollout.load(state, 0)
    ids = torch.randint(5, 40, (3, 12))
    with torch.no_grad():
        assert torch.equal(rollout.model(ids).logits, actor(ids).logits)
    shipped = [w.nbytes if hasattr(w, "scales") else w.numel() * w.element_size() for w in state.values()]
    assert size == sum(shipped)


def test_noise_is_on_in_rollout_off_in_validation_and_never_adds_up(checkpoint):
    schedule = AQNSchedule(total_steps=10)
    state, _ = weights_of(checkpoint)
    rollout = rollout_model(checkpoint, SETTINGS, schedule, torch.bfloat16)
    name = "model.layers.0.input_layernorm.weight"
    norm = dict(rollout.model.named_parameters())[name]
    rollout.load(state, 0)
    assert torch.equal(norm, state[name])  # stage 0: no noise
    rollout.load(state, 1)
    noisy = norm.clone()
    assert not torch.equal(noisy, state[name])
    assert torch.equal(noisy, schedule.noisy(name, state[name], 1))
    assert rollout.set_noise(False) == 0 and torch.equal(norm, state[name])
    rollout.load(state, 1)  # a sync in the middle of a validation
    assert torch.equal(norm, state[name])
    assert rollout.set_noise(True) == schedule.sigma(1) and torch.equal(norm, noisy)
    rollout.load(state, 1)
    assert torch.equal(norm, noisy)
    rollout.load(state, 2)
    assert torch.equal(norm, schedule.noisy(name, state[name], 2))


def test_samples_repeat_in_a_step_and_differ_between_steps(checkpoint):
    state, _ = weights_of(checkpoint)
    runs = []
    for _ in range(2):
        rollout = rollout_model(checkpoint, SETTINGS, None, torch.bfloat16, seed=3)
        steps = []
        for step in (0, 1):
            rollout.load(state, step)
            samples = rollout.sample([[5, 6, 7]] * 4, [8] * 4, Sampling(), [1, 1, 2, 1])
            assert [number for *_, number in samples] == [0, 1, 0, 2]
            steps.append([tokens for tokens, *_ in samples])
        runs.append(steps)
    assert runs[0] == runs[1] and runs[0][0] != runs[0][1]
    assert len(set(map(tuple, runs[0][0]))) > 1


def test_the_kv_cache_can_be_packed(checkpoint):
    """Samples repeat; the first token is that of the BF16 cache (a prompt sees itself as it came), later ones may differ."""
    state, _ = weights_of(checkpoint)
    drawn = {}
    for name, cache in (("bf16", None), ("packed", {"block": 16, "sink": 1}), ("again", {"block": 16, "sink": 1})):
        settings = Settings.from_config({"enable": True, "recipe": SETTINGS.recipe.to_dict(), "kv_cache": cache})
        rollout = rollout_model(checkpoint, settings, None, torch.float32)
        rollout.load(state, 0)
        drawn[name] = rollout.sample([[5, 6, 7] * 8, [8, 9]], [40, 40], Sampling(), [0, 1])
        assert (cache is None) == (rollout.make_cache is None)
    assert drawn["packed"] == drawn["again"]
    for (_, plain, _), (_, packed, _) in zip(drawn["bf16"], drawn["packed"], strict=True):
        assert packed[0] == pytest.approx(plain[0], abs=1e-5)
    assert drawn["packed"] != drawn["bf16"]
    assert rollout.describe_cache() == (
        "nvfp4 search in blocks of 16 tokens, 1 sinks, hadamard on queries and keys; dequantised for every token on cpu"
    )


def test_weights_that_do_not_fit_are_refused(checkpoint):
    state, actor = weights_of(checkpoint)
    rollout = rollout_model(checkpoint, SETTINGS, None, torch.bfloat16)
    name = "model.layers.0.mlp.down_proj.weight"
    with pytest.raises(ValueError, match=r"missing \['model.layers.0.mlp.down_proj.weight'\]"):
        rollout.load({k: v for k, v in state.items() if k != name}, 0)
    with pytest.raises(ValueError, match=r"unknown \['extra'\]"):
        rollout.load(state | {"extra": torch.zeros(1)}, 0)
    with pytest.raises(ValueError, match=r"quantised on one side \['model.layers.0.mlp.down_proj.weight'\]"):
        rollout.load(state | {name: actor.model.layers[0].mlp.down_proj.weight.detach()}, 0)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.down_proj.weight", "model.norm.weight"])
def test_weights_of_another_shape_are_refused_before_any_is_taken(checkpoint, name):
    """`copy_` would spread one number over a whole norm."""
    state, _ = weights_of(checkpoint)
    rollout = rollout_model(checkpoint, SETTINGS, None, torch.bfloat16)
    embeddings = rollout.model.model.embed_tokens.weight
    before = embeddings.clone()
    other = quantize(torch.ones(1, 64), SETTINGS.recipe.weight) if "mlp" in name else torch.ones(1)
    with pytest.raises(ValueError, match=rf"of other shapes \['{name} holds .* not \(1,"):
        rollout.load(state | {name: other}, 0)
    assert torch.equal(embeddings, before)
    assert all(layer.path == "no weights yet" for layer in rollout.packed_layers())


def test_logits_that_are_not_finite_are_an_error(model):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        generate(broken, [[1, 2]], [2], [0], Sampling(), {63}, 0)


# ---- the server's loop


def a_server(sample):
    own = object.__new__(MXFP4Server)
    own.config = SimpleNamespace(prompt_length=8, response_length=4)
    own.rollout = SimpleNamespace(sample=sample, stop_ids={2}, global_steps=1)
    own._waiting, own._worker, own._loop_task = Waiting(2), ThreadPoolExecutor(1), None
    return own


def answers(own, *prompts):
    """What each request got: tokens or the error's text; a request that is never answered fails the test."""

    async def ask():
        asked = (own.generate(prompt, {}, str(row), row=row) for row, prompt in enumerate(prompts))
        found = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 20)
        return [str(one) if isinstance(one, Exception) else one.token_ids for one in found]

    return ask()


def test_whatever_goes_wrong_with_a_batch_is_told_to_those_who_asked():
    made = iter([[([5], [0.0], 0)], [([], [0.0], 0), ([5], [0.0], 0)], [([5], [0.0], 0), ([6], [0.0], 1)]])
    own = a_server(lambda *_: next(made))

    async def batches():
        return [await answers(own, [1], [1]) for _ in range(3)]

    few, empty, right = asyncio.run(batches())  # a sample too few, one without a token, and the server lives on
    assert few[0] == [5] and few[1].startswith("rollout failed: ValueError: zip()")
    assert all(one.startswith("rollout failed: IndexError") for one in empty)
    assert right == [[5], [6]]


def test_when_the_loop_ends_nobody_waits_for_ever_and_the_next_request_starts_another():
    own = a_server(lambda prompts, *_: [([5], [0.0], 0)] * len(prompts))

    async def batches():
        incomparable = await answers(own, [1], ["1"], [2])  # sorting them fails outside of any batch
        return incomparable, await answers(own, [1], [2])

    broken, right = asyncio.run(batches())
    assert all(one.startswith("rollout failed: TypeError") for one in broken) and right == [[5], [5]]


def test_a_cancelled_loop_tells_those_in_its_batch_and_those_who_wait():
    began, over = threading.Event(), threading.Event()
    own = a_server(lambda *_: began.set() or over.wait(20))

    async def ended():
        asking = asyncio.ensure_future(answers(own, [1], [2], [3]))
        while not began.is_set():  # with two, as many as a batch has
            await asyncio.sleep(0.01)
        own._loop_task.cancel()
        found = await asking
        over.set()
        return found

    assert asyncio.run(ended()) == ["rollout failed: CancelledError: "] * 3


# ---- which requests make a batch


def request(prompt, row, temperature=1.0):
    return SimpleNamespace(prompt=prompt, row=row, sampling=Sampling(temperature=temperature))


def batches(arrivals, largest, expected=None):
    """What a server makes of requests that arrive with pauses: (seconds before it, request) each."""

    async def serve():
        waiting, made = Waiting(largest), []
        if expected:
            waiting.expect(expected)

        async def arrive():
            for pause, one in arrivals:
                await asyncio.sleep(pause)
                waiting.add(one)

        sender = asyncio.ensure_future(arrive())
        while sum(map(len, made)) < len(arrivals):
            made.append(await waiting.next_batch())
        await sender
        return [[(r.prompt, r.row) for r in batch] for batch in made]

    return asyncio.run(asyncio.wait_for(serve(), 60))


def test_an_announced_wave_makes_the_same_batches_however_it_arrives():
    wave = [([p], row) for p, row in ((3, 1), (1, 2), (1, 3), (2, 4), (2, 5))]
    expected = [[([1], 2), ([1], 3), ([2], 4)], [([2], 5), ([3], 1)]]
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1]):
        arrivals = [(0.2 if i == 2 else 0.0, request(*wave[k])) for i, k in enumerate(order)]  # longer than a server is patient
        assert batches(arrivals, 3, expected=5) == expected


def test_a_wave_that_lost_a_request_goes_on_without_it(monkeypatch):
    monkeypatch.setattr(waves, "_LOST", 0.3)
    assert batches([(0, request([2], 1)), (0, request([1], 2))], 8, expected=3) == [[([1], 2), ([2], 1)]]


def test_requests_nobody_announced_are_batched_as_they_come():
    assert batches([(0, request([2], 0)), (0, request([1], 0)), (1.0, request([1], 0))], 8) == [
        [([1], 0), ([2], 0)],
        [([1], 0)],
    ]
    greedy = batches([(0, request([1], 0)), (0, request([2], 0, temperature=0.0))], 8)
    assert greedy == [[([1], 0)], [([2], 0)]]  # one sampling a batch


def test_rows_are_numbered_in_a_step_and_waves_announced():
    sent, announced = [], []
    manager = SimpleNamespace(generate_sequences=lambda batch: sent.append(batch[waves.ROW].tolist()), name="verl's")
    numbered = waves.NumberedRows(manager, announced.append, samples=4, validation_samples=1)

    def batch(rows, **fields):
        return TensorDict({k: torch.tensor(v) for k, v in fields.items()}, batch_size=rows)

    for step, rows in ((1, 2), (1, 1), (2, 2)):  # the second of step 1 refills it
        one = batch(rows)
        one["global_steps"] = NonTensorData(step)
        numbered.generate_sequences(one)
    check = batch(3)
    check["global_steps"], check["validate"] = NonTensorData(2), NonTensorData(True)
    numbered.generate_sequences(check)
    own = batch(2, __rollout_n__=[3, 5])
    own["global_steps"] = NonTensorData(3)
    numbered.generate_sequences(own)
    assert sent == [[1, 2], [3], [1, 2], [-1, -2, -3], [1, 2]]
    assert announced == [8, 4, 8, 3, 8]
    assert numbered.name == "verl's"

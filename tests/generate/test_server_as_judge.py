"""A served model as the endpoint that judges."""

from attnpo_jax import config as config_lib
from attnpo_jax.evaluate.endpoint import Ask, Endpoint
from attnpo_jax.generate import generate
from tests.generate.calls import wait_until


def test_a_served_model_is_asked_as_any_other_endpoint(served, sampled, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    wait_until(lambda: served.is_listening)
    section = config_lib.default_config().evaluate.judge
    section.base_url, section.model = served.url, "model"
    questions = [[{"role": "user", "content": f"Is {i} even?"}] for i in range(10)]
    asks = [
        Ask(f"q{i}", tuple(messages), max_tokens=3, top_logprobs=5)
        for i, messages in enumerate(questions)
    ]
    answers = Endpoint.open(section, tmp_path / "judge.sqlite").ask(asks)
    expected = generate(sampled, questions, temperature=0, max_new_tokens=3)
    assert [answer.text for answer in answers] == [response.text for response in expected]
    for answer, response in zip(answers, expected, strict=True):
        assert answer.completion_tokens == len(response.tokens)
        assert answer.prompt_tokens == response.prompt_tokens
        told = len(response.tokens) - (response.finish_reason == "stop")
        assert len(answer.top_logprobs) == told
        for likeliest, logprob in zip(answer.top_logprobs, response.logprobs, strict=False):
            # The likeliest token is the one that was taken.
            assert abs(max(likeliest.values()) - logprob) < 1e-3
    section.base_url = "http://127.0.0.1:9/v1"
    assert Endpoint.open(section, tmp_path / "judge.sqlite").ask(asks) == answers

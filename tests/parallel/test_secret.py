"""Who does not know a run's secret gets nothing of it. As a script: such a process."""

import os
import re
import socket
import sys
import threading

import jax
import numpy as np
import pytest

from attnpo_jax.parallel import messages, processes, secret
from attnpo_jax.runtime import schema
from tests import forked
from tests.parallel.runs import environment

SECRET = "b" * 32


class Store:
    """The coordination service's key-value store, for threads."""

    def __init__(self):
        self._values, self._changed = {}, threading.Condition()

    def key_value_set(self, key, value):
        with self._changed:
            if key in self._values:
                raise jax.errors.JaxRuntimeError(f"ALREADY_EXISTS: {key}")
            self._values[key] = value
            self._changed.notify_all()

    def blocking_key_value_get(self, key, milliseconds):
        with self._changed:
            if not self._changed.wait_for(lambda: key in self._values, milliseconds / 1000):
                raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: nobody has said that")
            return self._values[key]


def meeting(*known):
    """What comes of a meeting of processes that know these secrets: keys or messages."""
    store, found = Store(), [None] * len(known)

    def process(index):
        try:
            found[index] = secret.meet(store, index, len(known), known[index])
        except secret.SecretError as error:
            found[index] = str(error)

    threads = [threading.Thread(target=process, args=(i,)) for i in range(len(known))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("known", [b"", b"the same for all"])
def test_who_knows_the_same_has_the_same_key_and_another_one_the_next_time(known):
    keys = meeting(known, known, known)
    assert len(set(keys)) == 1 and keys[0] != meeting(known, known, known)[0]
    assert known == b"" or known.decode() not in repr(keys)


def test_who_knows_another_secret_or_none_is_named_by_all_others():
    one, other, stranger = meeting(b"right", b"right", b"")
    assert one.startswith("process 2 of 3 has another secret than process 0, or none")
    assert other.startswith("process 2 of 3 has another secret than process 1, or none")
    assert stranger.startswith("process 0, 1 of 3 has another secret than process 2")
    assert "right" not in one + other + stranger


def test_who_does_not_answer_is_no_process_of_the_run(monkeypatch):
    monkeypatch.setattr(secret, "ANSWER_SECONDS", 0.01)
    with pytest.raises(secret.SecretError, match="process 1 of 2 does not say within 0.01 seconds"):
        secret.meet(Store(), 0, 2, b"")


def test_who_speaks_for_another_process_is_told_of():
    store = Store()
    store.key_value_set("attnpo_jax/secret/lot/0", "0")
    with pytest.raises(secret.SecretError, match="somebody else has spoken for process 0 of 2"):
        secret.meet(store, 0, 2, b"")


def test_the_secret_leaves_the_environment_and_must_be_one():
    environ = {secret.VARIABLE: SECRET, "HOME": "/"}
    assert secret.take(environ) == SECRET.encode() and environ == {"HOME": "/"}
    assert secret.take(environ) == b""
    with pytest.raises(secret.SecretError, match="has 7 characters; accepted: 16 or more") as found:
        secret.take({secret.VARIABLE: "letmein"})
    assert "letmein" not in str(found.value)


VALUE = {"rows": [[1, "a\ud800", None], [2, "", True]]}
FORM = schema.Table({"rows": schema.Listed(schema.Anything())})


def test_a_message_is_taken_from_its_sender_in_its_exchange_alone():
    key = secret.Key(b"k")
    header, body = messages.write(key, 5, 1, VALUE)
    assert len(header) == messages.HEADER_BYTES
    assert messages.length(key, 5, 1, header) == len(body)
    assert messages.read(key, 5, 1, body, FORM) == VALUE
    flipped = body ^ np.eye(1, len(body), 3, np.uint8)[0]
    for other, number, process, said in (
        (secret.Key(b"l"), 5, 1, body),
        (key, 6, 1, body),
        (key, 5, 0, body),
        (key, 5, 1, flipped),
    ):
        with pytest.raises(messages.MessageError, match="is not signed with the key of this run"):
            messages.read(other, number, process, said, FORM)
        if said is body:
            with pytest.raises(messages.MessageError, match="is not signed"):
                messages.length(other, number, process, header)


@pytest.mark.parametrize("told", [0, 32, 2**30 + 1, 2**63])
def test_no_room_is_made_for_a_length_that_none_can_be(told):
    key, told = secret.Key(), told.to_bytes(8, "big")
    header = np.frombuffer(told + key.sign("header 0", 1, told), np.uint8)
    with pytest.raises(messages.MessageError, match="process 1 says that it has"):
        messages.length(key, 0, 1, header)


@pytest.mark.parametrize(
    "text, why",
    [
        (b"[" * 100_000, "brackets are nested too deeply"),
        (b"\xff", "byte 0 is not UTF-8"),
        (b"9" * 5000, "integer string conversion"),
        (b"[NaN]", "NaN is no JSON"),
        (b'{"rows": 3}', r"rows is 3; accepted: a list"),
        (b"cos\nsystem\n(S'id'\ntR.", "Expecting value"),  # a pickle that runs a command
    ],
)
def test_what_is_said_is_json_of_the_expected_form(text, why):
    key = secret.Key()
    body = np.frombuffer(text + key.sign("body 0", 1, text), np.uint8)
    with pytest.raises(messages.MessageError, match=f"process 1 says something else.*{why}"):
        messages.read(key, 0, 1, body, FORM)


@pytest.mark.parametrize("value", [{1, 2}, b"", np.int64(3), np.zeros(2), float("nan")])
def test_what_is_no_json_is_not_said(value):
    with pytest.raises((TypeError, ValueError)):
        messages.write(secret.Key(), 0, 0, value)


def resolver(**addresses):
    def look_up(host, port, **_):
        families = {True: socket.AF_INET6, False: socket.AF_INET}
        found = addresses.get(host) or [host]
        return [(families[":" in one], socket.SOCK_STREAM, 6, "", (one, port)) for one in found]

    return look_up


def test_the_coordinator_listens_at_the_address_that_it_was_given(monkeypatch, caplog):
    monkeypatch.setattr(processes, "_is_own", lambda family, kind, at: at[0] != "203.0.113.9")
    named = resolver(pod=["203.0.113.9"], node=["127.0.0.1", "10.0.0.7"], debian=["127.0.1.1"])
    monkeypatch.setattr(processes.socket, "getaddrinfo", named)
    own = processes._own_address
    assert own("10.0.0.7:29400") == "10.0.0.7:29400"
    assert own("127.0.0.1:29400") == "127.0.0.1:29400"
    assert own("0.0.0.0:29400") == "0.0.0.0:29400"
    assert own("[::1]:29400") == "[::1]:29400"
    assert own("node:29400") == "10.0.0.7:29400"
    assert not caplog.records
    assert own("debian:29400") == "[::]:29400"
    assert "debian is 127.0.1.1 here, where others can't reach it" in caplog.text
    for elsewhere in ("203.0.113.9:29400", "pod:29400"):
        with pytest.raises(processes.ProcessesError, match="does not have that address") as found:
            own(elsewhere)
        assert "JAX_COORDINATOR_BIND_ADDRESS=0.0.0.0:29400" in str(found.value)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.process
@pytest.mark.parametrize("known", [None, "c" * 32])
def test_a_process_that_joins_without_the_secret_gets_nothing(tmp_path, known):
    """It has JAX take it for process 1, and says what ran a command when pickles were exchanged."""
    port, code = free_port(), tmp_path / "ran"
    command = [sys.executable, "-m", "tests.parallel.test_secret"]
    where = {
        "ATTNPO_COORDINATOR": f"127.0.0.1:{port}",
        "ATTNPO_NUM_PROCESSES": "2",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
    }
    shown = {} if known is None else {secret.VARIABLE: known}
    started = [
        forked.Process(
            [*command, role, code],
            environment() | where | {"ATTNPO_PROCESS_ID": str(index)} | knows,
        )
        for index, (role, knows) in enumerate(
            [("honest", {secret.VARIABLE: SECRET}), ("stranger", shown)]
        )
    ]
    honest, stranger = (process.communicate(timeout=120)[0] for process in started)
    assert started[0].returncode == 1, honest
    assert not code.exists()
    errors = re.findall("^attnpo: error: .*", honest, re.MULTILINE)
    assert len(errors) == 1, honest
    assert errors[0].startswith("attnpo: error: process 1 of 2 has another secret than process 0")
    assert "Traceback" not in honest and "exchanged" not in honest + stranger
    assert SECRET not in honest + stranger


def main(role, code):
    from attnpo_jax.parallel import failures

    if role == "stranger":
        # What a hostile process would do: it asks for no proof, and goes on.
        def meet(client, process, count, own):
            key = secret.Key(own)
            for what in ("lot", "proof"):
                client.key_value_set(f"attnpo_jax/secret/{what}/{process}", "0" * 64)
            return key

        secret.meet = meet
        import pickle

        class Command:
            def __reduce__(self):
                return os.system, (f"touch {code}",)

        body = np.frombuffer(pickle.dumps(Command()), np.uint8)
        messages.write = lambda key, number, process, value: (np.zeros(40, np.uint8), body)
    failures.join()
    print("exchanged", processes.exchange([1], schema.Listed(schema.Whole())), flush=True)
    return 0


if __name__ == "__main__":
    from attnpo_jax.runtime import program

    program.start_logging()
    sys.exit(program.exit_code("attnpo", lambda: main(*sys.argv[1:])))

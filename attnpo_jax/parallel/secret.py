"""The secret of a run, and what is signed with it.

Processes that share a secret show each other that they know it, without telling it, before
anything that another one says is believed. Each then signs what it says with a key that is made of
the secret and of what this meeting drew by lot: nothing can be repeated in another run, or as
another process. Without a secret, all of that goes on with an empty one, which shows nothing; see
docs/launching.md for what the network must then be trusted for.
"""

import dataclasses
import hashlib
import hmac
import secrets
from collections.abc import MutableMapping
from typing import Any

import jax

from attnpo_jax.runtime.errors import UserError

VARIABLE = "ATTNPO_SECRET"
# Of a text that can't be guessed; scripts in launch/ make 64 hexadecimal digits.
LEAST_CHARACTERS = 16
# All have met already when they ask each other.
ANSWER_SECONDS = 60

SIGNATURE_BYTES = 32
_FOLDER = "attnpo_jax/secret/"


class SecretError(UserError):
    """A process of the run does not know its secret."""


@dataclasses.dataclass(frozen=True, repr=False)
class Key:
    """Signs what is said in this run."""

    _key: bytes = b""

    def sign(self, kind: str, process: int, content: bytes) -> bytes:
        """The signature of what a process says.

        Args:
          kind: what it is said as, and where; what was signed as another kind is not taken for it.
        """
        # As a digest, or one text's end could be another's beginning.
        said = hashlib.sha256(content).hexdigest()
        return _mac(self._key, f"{kind}\n{process}\n{said}")

    def holds(self, kind: str, process: int, content: bytes, signature: bytes) -> bool:
        """Whether that process has signed that content as that kind."""
        return hmac.compare_digest(self.sign(kind, process, content), signature)


def take(environ: MutableMapping[str, str]) -> bytes:
    """The secret, which goes from the environment: children of this process have no use for it.

    Raises:
      SecretError: it is too short to be one.
    """
    text = environ.pop(VARIABLE, "")
    if text and len(text) < LEAST_CHARACTERS:
        raise SecretError(
            f"{VARIABLE} has {len(text)} characters; accepted: {LEAST_CHARACTERS} or more that "
            "nobody can guess, such as those of `openssl rand -hex 32`"
        )
    return text.encode("utf-8", "surrogateescape")


def meet(client: Any, process: int, count: int, secret: bytes) -> Key:
    """Shows the other processes that this one knows the secret, and has them show it.

    Args:
      client: of JAX's coordination service.
      process: this one, of `count`.

    Raises:
      SecretError: others know another one or none, or do not answer.
    """
    lots = _tell_all(client, "lot", process, count, secrets.token_hex(32))
    # Whoever has put in another's lot has all see other ones, and their proofs fail.
    meeting = hashlib.sha256("\n".join(lots).encode()).hexdigest()
    proofs = [_mac(secret, f"proof\n{meeting}\n{k} of {count}").hex() for k in range(count)]
    shown = _tell_all(client, "proof", process, count, proofs[process])
    strangers = [
        str(k)
        for k in range(count)
        if not hmac.compare_digest(proofs[k].encode(), shown[k].encode())
    ]
    if strangers:
        raise SecretError(
            f"process {', '.join(strangers)} of {count} has another secret than process {process}, "
            f"or none: nothing that it says is believed; accepted: the same {VARIABLE} in the "
            "environment of all processes of a run, and nobody else at its coordinator's port"
        )
    return Key(_mac(secret, f"key\n{meeting}"))


def _tell_all(client: Any, what: str, process: int, count: int, text: str) -> list[str]:
    try:
        client.key_value_set(f"{_FOLDER}{what}/{process}", text)
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith("ALREADY_EXISTS"):
            raise
        raise SecretError(
            f"somebody else has spoken for process {process} of {count}: two processes have that "
            "number, or one that is not of this run has reached the coordinator's port"
        ) from error
    told = []
    for k in range(count):
        try:
            told.append(
                client.blocking_key_value_get(f"{_FOLDER}{what}/{k}", ANSWER_SECONDS * 1000)
            )
        except (jax.errors.JaxRuntimeError, ValueError) as error:  # late, or no text
            raise SecretError(
                f"process {k} of {count} does not say within {ANSWER_SECONDS} seconds that it "
                "knows the secret of this run: it is of another version, or not of this run"
            ) from error
    return told


def _mac(key: bytes, text: str) -> bytes:
    return hmac.digest(key, text.encode("utf-8", "surrogatepass"), "sha256")

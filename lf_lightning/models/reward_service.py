"""A reward that an HTTP service gives, by LlamaFactory's protocol."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from lf_lightning.models.rewards import WHERE, Reward, RewardBatch, RewardSetting, check_weight
from lf_lightning.types import InputError, TrainingStopped

if TYPE_CHECKING:
    import requests

_SERVICE = f"{WHERE}: RewardService"
TRIED_AGAIN = (408, 429, 500, 502, 503, 504)
"""Answers that may be another one a little later."""


@dataclass(eq=False)
class RewardService(Reward):
    """A service that answers POST {"model": "model", "messages": [text, ...]} with {"scores": [number, ...]}.

    Each text is prompt and response as one, special tokens included: LlamaFactory's protocol. No connection, no answer
    in time, and the statuses 408, 429, 500, 502, 503 and 504 are tried again: the first time at once, then with growing
    pauses. Redirects are not followed.

    Args:
        url: Where to post, http or https.
        timeout: Seconds to wait for a connection, and then for an answer to come or to go on, > 0.
        retries: How often a request is tried again, >= 0. With `backoff`, how long the service may be gone: 31 seconds
            with both defaults.
        backoff: Seconds before the second retry, >= 0; each further pause is twice the one before, up to 120 seconds.
        batch_size: Texts of a request, > 0.
        token_env: Environment variable with a bearer token; empty sends none. The token is in no file and no message.
        weight: Its part in the sum of all rewards.
    """

    url: str
    timeout: float = 30.0
    retries: int = 6
    backoff: float = 1.0
    batch_size: int = 32
    token_env: str | None = None
    weight: float = 1.0
    _session: requests.Session | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        """Refuse values outside their range.

        Raises:
            InputError: As said.
        """
        check_weight(self)
        for name, holds, want in (
            ("url", _is_address(self.url), "an address with http:// or https://"),
            ("timeout", 0 < self.timeout < math.inf, "positive"),
            ("retries", self.retries >= 0, "0 or more"),
            ("backoff", 0 <= self.backoff < math.inf, "0 or more"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
        ):
            if not holds:
                raise InputError(f"{_SERVICE}.{name}: must be {want}, got {vars(self)[name]!r}. Correct it.")

    def prepare(self, setting: RewardSetting) -> None:
        """Open a session, with the token if there is one.

        Raises:
            InputError: The variable that `token_env` names is not set.
        """
        import requests
        from requests.adapters import HTTPAdapter
        from urllib3 import Retry

        session = requests.Session()
        if self.token_env:
            token = os.environ.get(self.token_env, "").strip()  # a secret belongs into no configuration
            if not token:
                raise InputError(
                    f"{_SERVICE}.token_env: must name a variable that is set, got {self.token_env}. Set it."
                )
            if not token.isascii() or not token.isprintable() or " " in token:
                raise InputError(
                    f"{_SERVICE}.token_env: {self.token_env} must hold one word, got something else. Mend it."
                )
            session.auth = partial(_with_token, token)  # as a header alone, a .netrc would replace it
        again = Retry(
            total=self.retries,
            status_forcelist=TRIED_AGAIN,
            allowed_methods=None,  # scoring changes nothing there, so that a POST may be sent twice
            backoff_factor=self.backoff / 2,  # urllib3's pauses are factor * 2, 4, 8 ...
            backoff_max=120,
            retry_after_max=120,
            raise_on_status=False,
        )
        for prefix in ("http://", "https://"):
            session.mount(prefix, HTTPAdapter(max_retries=again))
        self._session = session

    def score(self, prompts: Sequence[str], responses: Sequence[str], batch: RewardBatch) -> list[float]:
        """What the service answers; (B,)."""
        whole = [[*prompt, *ids] for prompt, ids in zip(batch.prompt_ids, batch.response_ids, strict=True)]
        texts = batch.tokenizer.batch_decode(whole, skip_special_tokens=False)
        parts = [texts[start : start + self.batch_size] for start in range(0, len(texts), self.batch_size)]
        return [score for part in parts for score in self._scores(part)]

    def _scores(self, texts: list[str]) -> list[float]:
        import requests

        assert self._session is not None, "prepare comes first"
        message = {"model": "model", "messages": texts}
        try:
            answer = self._session.post(self.url, json=message, timeout=self.timeout, allow_redirects=False)
        except requests.RequestException as error:
            raise self._stop("answer", f"{_kind(error)} after {self.retries} retries") from error
        if answer.status_code != 200:
            raise self._stop("answer with status 200", f"{answer.status_code} and {_shortened(answer.text)}")
        try:
            found: Any = answer.json()
        except requests.JSONDecodeError as error:
            raise self._stop("answer in JSON", _shortened(answer.text)) from error
        scores = found.get("scores") if isinstance(found, dict) else None
        if not isinstance(scores, list):
            raise self._stop('answer {"scores": [...]}', _shortened(answer.text))
        if len(scores) != len(texts):
            raise self._stop(f"give {len(texts)} scores to {len(texts)} texts", str(len(scores)))
        for place, score in enumerate(scores, start=1):
            is_number = isinstance(score, (int, float)) and not isinstance(score, bool)
            if not is_number or not math.isfinite(score):
                raise self._stop("give finite numbers", f"{score!r} as score {place} of {len(scores)}")
        return [float(score) for score in scores]

    def _stop(self, want: str, got: str) -> TrainingStopped:
        where = urlsplit(self.url)
        shown = f"{where.scheme}://{where.hostname}{f':{where.port}' if where.port else ''}{where.path}"
        return TrainingStopped(
            f"{_SERVICE}: {shown} must {want}, got {got}. Mend the service, and continue with --ckpt_path last."
        )


def _is_address(url: str) -> bool:
    try:
        address = urlsplit(url)
        _ = address.port  # raises where it is no port
    except ValueError:
        return False
    return address.scheme in ("http", "https") and bool(address.hostname)


def _with_token(token: str, request: requests.PreparedRequest) -> requests.PreparedRequest:
    request.headers["Authorization"] = f"Bearer {token}"
    return request


def _kind(error: requests.RequestException) -> str:
    """What went wrong, without the library's text, which may hold secrets of the address."""
    found = error.args[0] if error.args else error
    reason = getattr(found, "reason", found)  # urllib3's last error, where it has tried often enough
    return type(reason).__name__ if isinstance(reason, Exception) else type(error).__name__


def _shortened(text: str) -> str:
    words = " ".join(text.split())
    return repr(words if len(words) <= 120 else words[:117] + "...")

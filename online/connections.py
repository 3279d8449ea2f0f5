"""How every process reaches Redis and Celery. Creating a connection object opens nothing."""

import subprocess

import redis
from celery import Celery

from online.buffer import BufferLimits
from online.processes import ROOT
from online.redis_buffer import RedisBuffer
from online.settings import Settings

CYCLE_TASK = "trainer.cycle"
TICK_TASK = "trainer.tick"


def redis_client(settings: Settings) -> "redis.Redis":
    """A client with short timeouts: serving must not wait for Redis."""
    return redis.Redis.from_url(settings.redis_url, socket_timeout=2, socket_connect_timeout=1)


def signal_buffer(settings: Settings) -> RedisBuffer:
    limits = BufferLimits(settings.buffer_signals, settings.buffer_bytes, settings.retention_s)
    return RedisBuffer(redis_client(settings), limits)


def celery_app(settings: Settings) -> Celery:
    """One configuration for the worker, for beat, and for the API, which only sends.

    The broker redelivers quickly, within seconds of a kill -9. A task that runs twice is harmless,
    since cycles are leased and fenced in SQL.
    """
    transport = {
        "visibility_timeout": int(settings.cycle_limit_s + 60),
        "unacked_restore_interval": 1,
        "unacked_restore_throttle": 1,
        "socket_timeout": 5,
        "socket_connect_timeout": 2,
    }
    app = Celery("slipstream", broker=settings.redis_url)
    app.conf.update(
        task_default_queue="slipstream",
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        task_ignore_result=True,
        worker_prefetch_multiplier=1,
        worker_concurrency=1,
        worker_cancel_long_running_tasks_on_connection_loss=True,
        worker_hijack_root_logger=False,
        visibility_timeout=transport["visibility_timeout"],
        broker_transport_options=transport,
        result_backend_transport_options=transport,
        broker_connection_retry_on_startup=True,
        task_publish_retry=False,
        task_time_limit=settings.cycle_limit_s + 30,
        beat_schedule={
            "tick": {
                "task": TICK_TASK,
                "schedule": settings.tick_s,
                "options": {"expires": settings.tick_s * 3},
            }
        },
    )
    return app


def git_commit() -> str:
    """The commit of this code, for the registry; "unknown" outside a checkout."""
    try:
        found = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.strip()

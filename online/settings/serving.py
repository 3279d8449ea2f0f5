"""Settings of storage, models and serving."""

from pathlib import Path

from pydantic import BaseModel, Field

from online.messages import MAX_GAMMA
from online.settings.types import Keys
from online.speculation import DraftingOptions


class StorageSettings(BaseModel):
    data_dir: Path = Field(
        Path(".slipstream"),
        description="folder of the embedded database, the embedded Redis and artifacts",
    )
    database_url: str = Field(
        "",
        description="SQLAlchemy URL; empty: SQLite in data_dir",
    )
    redis_url: str = Field(
        "",
        description="redis:// URL of broker and buffer; empty: `slipstream up` starts a server",
    )
    artifacts_dir: Path | None = Field(
        None,
        description="folder of draft weights; empty: data_dir/artifacts",
    )


class ModelSettings(BaseModel):
    target: str = Field(
        "",
        description="target model: folder or hub id; empty: the embedded reference target",
    )
    draft: str = Field(
        "",
        description="first draft model: folder or hub id; empty: the embedded reference draft",
    )
    model_name: str = Field(
        "",
        description="model name that /v1/models shows; empty: the target's folder or hub name",
    )
    device: str = Field(
        "auto",
        description="cpu, cuda or cuda:N; auto: cuda if there is a GPU",
    )
    dtype: str = Field(
        "auto",
        pattern="^(auto|float32|bfloat16|float16)$",
        description="auto: float32 on a CPU, the stored dtype on a GPU",
    )
    threads: int = Field(
        0,
        ge=0,
        description="torch threads of the decoder; 0: one fewer than there are cores",
    )


class ServingSettings(BaseModel):
    host: str = Field(
        "",
        description="address to bind; empty: all addresses with keys, loopback without keys",
    )
    port: int = Field(
        8000,
        ge=0,
        le=65535,
        description="port of the REST API",
    )
    generation_keys: Keys = Field(
        (),
        description="generation keys as name:sha256, comma-separated",
    )
    admin_keys: Keys = Field(
        (),
        description="admin keys as name:sha256, comma-separated",
    )
    slots: int = Field(
        16,
        ge=1,
        le=1024,
        description="sequences decoded together",
    )
    max_waiting: int = Field(
        256,
        ge=1,
        description="length of the queue; a request beyond it gets 429",
    )
    max_context: int = Field(
        2048,
        ge=16,
        description="tokens of prompt and output together, at most the model's own limit",
    )
    gamma: int = Field(
        6,
        ge=0,
        le=MAX_GAMMA,
        description="maximum of drafted tokens per step; the engine picks the fastest number",
    )
    drafters: dict[str, DraftingOptions] = Field(
        {},
        description="JSON: default drafting options of each route, "
        'for example {"default": {"drafter": "tree"}}',
    )
    lenience_floor: float = Field(
        1.0,
        gt=0,
        le=1,
        description="smallest epsilon of lossy decoding that a request may ask for; 1: none",
    )
    prefill_tokens: int = Field(
        0,
        ge=0,
        description="maximum of prompt tokens computed between two steps; "
        "0: 256 on a CPU, 2048 on a GPU",
    )
    kept_contexts: int = Field(
        8,
        ge=0,
        le=1024,
        description="finished contexts kept so that later requests of the route reuse prefixes",
    )

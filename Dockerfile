# One image for every service. PyPI's torch includes CUDA. For a small CPU image:
#   docker compose build --build-arg TORCH="torch==2.13.0+cpu" --build-arg PIP_EXTRA_INDEX_URL=...
FROM python:3.12-slim

ARG TORCH="torch==2.13.0"
ARG PIP_EXTRA_INDEX_URL
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1

WORKDIR /app
COPY constraints.txt pyproject.toml README.md ./
COPY online online
COPY decoder decoder
COPY trainer trainer
COPY migrations migrations
COPY lab lab
RUN pip install -c constraints.txt "${TORCH}" && pip install -c constraints.txt . \
    && useradd --create-home --uid 10001 slipstream \
    && mkdir /artifacts /data && chown slipstream /artifacts /data

USER slipstream
ENV SLIPSTREAM_ARTIFACTS_DIR=/artifacts SLIPSTREAM_DATA_DIR=/data
ENTRYPOINT ["slipstream"]
CMD ["decoder"]

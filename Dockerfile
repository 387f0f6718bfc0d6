# CUDA's runtime libraries come with torch's wheels; the base brings the driver interface and, with apt, Python.
# Debian bookworm works as well (Python 3.11 there, 3.12 on Ubuntu 24.04). BASE_IMAGE takes a digest too, behind the tag.
ARG BASE_IMAGE=nvidia/cuda:12.8.1-base-ubuntu24.04
FROM ${BASE_IMAGE}

SHELL ["/bin/sh", "-eu", "-c"]

# gcc and the headers are Triton's: it compiles a launcher for each kernel at run time. make is for the unit test that
# resolves every target. Versions are the base image's: pinned ones would vanish from the mirrors.
# hadolint ignore=DL3008
RUN export DEBIAN_FRONTEND=noninteractive; \
    apt-get update; \
    apt-get install -y --no-install-recommends \
        ca-certificates gcc libc6-dev make python3 python3-dev python3-venv; \
    rm -rf /var/lib/apt/lists/* /var/cache/ldconfig/aux-cache /var/log/apt /var/log/*.log

# Dependencies, a layer that only the lock files change. Secrets exist during this step alone and leave no trace:
# ca_bundle for a proxy that opens TLS, index_url for a package index of one's own (a build argument would stay in
# the image's history). uv is used once and not kept.
WORKDIR /src
RUN --mount=type=secret,id=ca_bundle --mount=type=secret,id=index_url \
    --mount=type=bind,source=requirements.lock,target=/mnt/requirements.lock \
    --mount=type=bind,source=requirements-uv.lock,target=/mnt/requirements-uv.lock \
    if [ -s /run/secrets/ca_bundle ]; then export PIP_CERT=/run/secrets/ca_bundle SSL_CERT_FILE=/run/secrets/ca_bundle; fi; \
    if [ -s /run/secrets/index_url ]; then \
        PIP_INDEX_URL=$(cat /run/secrets/index_url); UV_DEFAULT_INDEX=$PIP_INDEX_URL; export PIP_INDEX_URL UV_DEFAULT_INDEX; \
    fi; \
    export UV_NO_CACHE=1 UV_COMPILE_BYTECODE=1 UV_HTTP_TIMEOUT=300; \
    python3 -m venv /tmp/uv; \
    /tmp/uv/bin/pip install --quiet --no-cache-dir --require-hashes -r /mnt/requirements-uv.lock; \
    python3 -m venv --without-pip .venv; \
    /tmp/uv/bin/uv pip install --python .venv --require-hashes -r /mnt/requirements.lock; \
    rm -rf /tmp/uv; \
    mkdir -p runs data /data/coco; \
    mkdir -m 1777 /cache

# Any uid works: no name is needed (torch asks for USER), nothing is written outside /src/runs, /cache and /tmp.
ENV PATH=/src/.venv/bin:$PATH \
    USER=app \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

COPY --chmod=755 . .

ARG BASE_IMAGE
ARG APP_VERSION=unknown
ARG APP_REVISION=unknown
ARG APP_SOURCE=unknown
ARG APP_CONTEXT=unknown
ENV APP_REVISION=${APP_REVISION}
LABEL org.opencontainers.image.title="w4a16-detector" \
      org.opencontainers.image.description="YOLOv10 from random weights: FP16 against W4A16 QAT, one evaluator, one report" \
      org.opencontainers.image.source="${APP_SOURCE}" \
      org.opencontainers.image.version="${APP_VERSION}" \
      org.opencontainers.image.revision="${APP_REVISION}" \
      org.opencontainers.image.licenses="AGPL-3.0-only" \
      org.opencontainers.image.base.name="${BASE_IMAGE}" \
      app.context="${APP_CONTEXT}"

USER 1000:1000
ENTRYPOINT ["python", "-m", "app"]
CMD ["--help"]

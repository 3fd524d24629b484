#!/usr/bin/env bash
set -euo pipefail

usage() {
  cat << 'END'
Build the container image of Prelude with docker or podman.

  deploy/build_image.sh [cpu|gpu] [-- OPTIONS OF THE ENGINE'S build]

  cpu   prelude-server:cpu, with torch's build for CPUs (the default)
  gpu   prelude-server:gpu, with torch's usual build, which brings CUDA: several gigabytes

Variables, all optional:
  ENGINE           docker or podman; default: the first of them that is installed
  TAG              the image's name instead of prelude-server:cpu or prelude-server:gpu
  BASE_IMAGE       the base image; default: docker.io/library/python:3.11-slim-bookworm. Pin it by its digest:
                     docker buildx imagetools inspect python:3.11-slim-bookworm     shows it
                     BASE_IMAGE=docker.io/library/python:3.11-slim-bookworm@sha256:... deploy/build_image.sh
  TORCH_INDEX_URL  the index of torch's CPU builds; default: https://download.pytorch.org/whl/cpu. Empty: none
  TORCH_SHA256     the SHA-256 of torch's wheel, as that index states it; pip then refuses another file
  PIP_CONF, NPMRC, CA_BUNDLE
                   files with pip's settings, npm's settings and CA certificates, for a build behind a proxy or a
                   mirror. They are build secrets: no layer contains them
  SBOM             where to copy the list of the image's Python packages (CycloneDX, JSON); default: not copied. The
                   image has it in /usr/share/doc/prelude/sbom.cdx.json

Examples:
  deploy/build_image.sh
  ENGINE=podman SBOM=sbom.json deploy/build_image.sh
  CA_BUNDLE=/etc/ssl/certs/ca-certificates.crt PIP_CONF=~/.config/pip/pip.conf deploy/build_image.sh -- --network host
END
}

fail() {
  echo "deploy/build_image.sh: $1" >&2
  exit 2
}

case "${1:-cpu}" in
  -h | --help) usage; exit ;;
  cpu | gpu) kind=${1:-cpu}; shift || true ;;
  --) kind=cpu ;;
  *) fail "there is no image \"$1\": expected cpu or gpu, then -- before options of the engine; see --help" ;;
esac
[ "${1:-}" != -- ] || shift

engine=${ENGINE:-$(command -v docker || command -v podman || true)}
[ -n "$engine" ] || fail "neither docker nor podman is installed; install one, or name its path in ENGINE"
command -v "$engine" > /dev/null || fail "ENGINE names \"$engine\", which is not a command here"

tag=${TAG:-prelude-server:$kind}
options=(--tag "$tag")
if "$engine" --version | grep -qi podman; then
  options+=(--format docker)  # the format of podman's default has no HEALTHCHECK
fi
[ "$kind" = cpu ] || : "${TORCH_INDEX_URL=}"
for name in BASE_IMAGE TORCH_INDEX_URL TORCH_SHA256; do
  [ -z "${!name+set}" ] || options+=(--build-arg "$name=${!name}")
done
for secret in pipconf=PIP_CONF npmrc=NPMRC ca=CA_BUNDLE; do
  name=${secret#*=}
  [ -n "${!name:-}" ] || continue
  [ -r "${!name}" ] || fail "$name names \"${!name}\", which is not a readable file"
  options+=(--secret "id=${secret%%=*},src=${!name}")
done

cd "$(dirname "${BASH_SOURCE[0]}")/.."
options+=(--label "org.opencontainers.image.version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)")
if revision=$(git describe --always --exclude '*' --abbrev=40 --dirty 2> /dev/null); then
  options+=(--label "org.opencontainers.image.revision=$revision")
fi
started=$SECONDS
DOCKER_BUILDKIT=1 "$engine" build "${options[@]}" "$@" .
bytes=$("$engine" image inspect --format '{{.Size}}' "$tag")
echo "$tag: $((bytes / 1000000)) MB, built in $((SECONDS - started)) s"
if [ -n "${SBOM:-}" ]; then
  "$engine" run --rm --network none --entrypoint cat "$tag" /usr/share/doc/prelude/sbom.cdx.json > "$SBOM"
  echo "$SBOM: what the image is made of"
fi

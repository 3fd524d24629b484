#!/usr/bin/env bash
# Builds images under the names of the official ones, for a machine that has podman and Debian's archive but reaches no
# registry: the base image by debootstrap, Prometheus from Debian, moto from PyPI, and a program in place of Grafana.
#
#   ENGINE=podman tests/image/standins.sh [OPTIONS OF THE ENGINE'S build]
#
# PIP_CONF and CA_BUNDLE as for deploy/build_image.sh. Needs root and debootstrap. It replaces no image that is there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

engine=${ENGINE:-podman}
base=docker.io/library/python:3.11-slim-bookworm

if ! "$engine" image inspect "$base" > /dev/null 2>&1; then
  root=$(mktemp -d)
  trap 'rm -rf "$root"' EXIT
  debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv bookworm "$root"
  # As in Debian's slim images.
  rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/usr/share/{doc,info,lintian,locale,man}/*
  mkdir -p "$root/var/cache/apt/archives/partial" "$root/var/lib/apt/lists/partial"
  tar -C "$root" -c . | "$engine" import --change 'CMD ["python3"]' - "$base"
fi

secrets=()
[ -z "${PIP_CONF:-}" ] || secrets+=(--secret "id=pipconf,src=$PIP_CONF")
[ -z "${CA_BUNDLE:-}" ] || secrets+=(--secret "id=ca,src=$CA_BUNDLE")
for image in $(sed -n 's/^    image: \(docker\.io.*\)/\1/p' ../../docker-compose.yml); do
  "$engine" image inspect "$image" > /dev/null 2>&1 && continue
  name=${image%:*}
  "$engine" build --file standins/Dockerfile --target "${name##*/}" --tag "$image" "${secrets[@]}" "$@" .
done

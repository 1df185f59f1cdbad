#!/bin/sh
# Installs or upgrades clip-shim on the node that this runs on, from a privileged container that shares its PIDs.
# Each step does nothing where it was done already; a failure fails the pod, and the node stays as it is.
set -eu

engine=${ENGINE:-containerd}
pid=${NODE_PID:-1} # PID 1 of the node
root=/proc/$pid/root
packages=${PACKAGES:-/packages}
config=${CONFIG:-/config/config.yaml}

node() { nsenter --target "$pid" --mount --uts --ipc --net -- "$@"; }

place=/run/clip-shim-install
rm -rf "$root$place"
mkdir -p -m 700 "$root$place"
trap 'rm -rf "$root$place"' EXIT

if [ -e "$config" ] && [ ! -e "$root/etc/clip-shim/config.yaml" ]; then
    mkdir -p "$root/etc/clip-shim"
    cp "$config" "$root/etc/clip-shim/.config.yaml" # whole, or not there
    mv "$root/etc/clip-shim/.config.yaml" "$root/etc/clip-shim/config.yaml"
fi
if node sh -c 'command -v dpkg >/dev/null'; then
    cp "$packages"/*.deb "$root$place/"
    node sh -c "DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends \
        -o Dpkg::Options::=--force-confold $place/*.deb"
else
    cp "$packages"/*.rpm "$root$place/"
    node sh -c "dnf install -y $place/*.rpm || rpm --upgrade --replacepkgs $place/*.rpm"
fi

due=$root/run/clip-shim-restart-$engine # remembers that the engine has not read its file yet, should this end here
changes=$(node clip-shim install "$engine" --dry-run)
if [ -n "$(printf '%s' "$changes" | grep '^[-+]' || true)" ]; then
    touch "$due"
fi
node clip-shim install "$engine"
if [ -e "$due" ]; then
    # pods that run go on: their shims are not the engine's children
    node systemctl restart "$engine"
    rm "$due"
fi
node systemctl try-restart clip-shim.service || true

# 1 is a warning
node clip-shim doctor || [ $? -eq 1 ]

#!/bin/bash
# Installs what the demo and the tests need on Debian 12+ or Ubuntu 24.04+, and only what is missing.
# Starts no service: the tests run private engines in directories of their own.
set -euo pipefail

packages=(
    attr busybox-static conmon containerd crun docker-registry docker.io e2fsprogs erofs-utils fuse3 groff-base iptables
    libcap2-bin make mmdebstrap pigz podman procps python3-venv runc skopeo strace systemd umoci util-linux xz-utils zstd
)

if ! command -v apt-get >/dev/null; then
    echo "install-deps: no apt-get here; install by hand: ${packages[*]}" >&2
    exit 0
fi

missing=()
for package in "${packages[@]}"; do
    [[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || missing+=("$package")
done
command -v docker >/dev/null || missing+=(docker-cli) # Debian 13 has the client in a package of its own
if [[ -x /usr/bin/python3 ]] && ! /usr/bin/python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    command -v python3.11 >/dev/null || missing+=(python3.11 python3.11-venv) # Ubuntu 22.04 has both
fi
((${#missing[@]})) || exit 0

if ((EUID != 0)); then
    echo "install-deps: not root, so these are not installed: ${missing[*]}" >&2
    exit 0
fi

# Without this, docker.io's and containerd's maintainer scripts would start engines, or fail where systemd is not PID 1.
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
fi

export DEBIAN_FRONTEND=noninteractive
for attempt in 1 2 3; do
    apt-get update -qq && break
    ((attempt < 3)) || { echo "install-deps: apt-get update failed three times" >&2; exit 1; }
done
wanted=()
for package in "${missing[@]}"; do # docker-cli does not exist before Debian 13
    if [[ $package != docker-cli ]] || apt-cache show docker-cli >/dev/null 2>&1; then wanted+=("$package"); fi
done
echo "installing: ${wanted[*]}"
log=$(mktemp)
apt-get install -y -q --no-install-recommends -o Dpkg::Use-Pty=0 "${wanted[@]}" >"$log" 2>&1 || {
    cat "$log" >&2
    exit 1
}
rm -f "$log"

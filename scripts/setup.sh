#!/usr/bin/env bash
# Makes .venv with everything in it. Takes a moment when nothing has changed since the last time.
#
#   scripts/setup.sh            a browser is wanted, not needed
#   scripts/setup.sh browser    stops where there is no browser
#
# Whatever Debian package is missing is installed when this runs as root; otherwise it is named,
# with the command that installs it. PYTHON chooses the interpreter (default: python3).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
venv=.venv
stamp=$venv/.megafold-setup
wanted=${1:-}

say() { printf 'setup: %s\n' "$@"; }
stop() {
    printf 'setup: %s\n' "$@" >&2
    exit 1
}

may_install() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }

install_packages() {
    say "installing Debian packages: $*"
    DEBIAN_FRONTEND=noninteractive apt-get update -qq </dev/null &&
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" \
            </dev/null >/dev/null
}

# The names that megafold.viz.browser looks for.
browser() {
    if [ -n "${BROWSER_PATH:-}" ]; then
        [ -x "$BROWSER_PATH" ] && return
        stop "BROWSER_PATH is $BROWSER_PATH, and no executable stands there."
    fi
    local name
    for name in chromium-headless-shell chrome-headless-shell chromium chromium-browser \
        google-chrome google-chrome-stable microsoft-edge; do
        command -v "$name" >/dev/null && return
    done
    return 1
}

# Only the tests need this, and asking takes half a second.
drives_browser() {
    [ "$wanted" != browser ] || "$venv/bin/python" -m playwright --version >/dev/null 2>&1
}

compiles() {
    command -v g++ >/dev/null && "$venv/bin/python" -c \
        'import pathlib, sysconfig as s; pathlib.Path(s.get_path("include"), "Python.h").open()' \
        2>/dev/null
}

fingerprint() {
    { cat pyproject.toml constraints.txt scripts/setup.sh && "$1" --version && pwd; } | sha256sum
}

works() { [ -x "$venv/bin/python" ] && "$venv/bin/python" -c 'import pip' 2>/dev/null; }

make_venv() {
    command -v "$python" >/dev/null ||
        stop "there is no $python here. Python 3.11 or later is needed:" \
            "    sudo apt-get install python3 python3-venv"
    case $(command -v "$python") in
    "$PWD/$venv"/*) stop "$venv is active and broken. Leave it first: deactivate" ;;
    esac
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        stop "$("$python" --version) is too old: Python 3.11 or later is needed." \
            "If another is installed: PYTHON=python3.12 make setup"
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        may_install && install_packages python3-venv || true
        "$python" -c 'import ensurepip, venv' 2>/dev/null ||
            stop "Python's venv module is missing. On Debian and Ubuntu:" \
                "    sudo apt-get install python3-venv"
    fi
    say "making $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
}

install_everything() {
    say "installing into $venv (minutes the first time; PyTorch is the most of it)"
    if ! "$venv/bin/python" -m pip install --disable-pip-version-check \
        -c constraints.txt -e '.[all]' </dev/null; then
        stop "pip could not install the packages; its message stands above." \
            "Usual reasons: no network, a full disk ($(df -Ph . | awk 'NR == 2 { print $4 }') free)," \
            "or a Python that PyTorch has no build for ($("$venv/bin/python" --version))." \
            "What is there already is kept: run the same command again."
    fi
    fingerprint "$venv/bin/python" >"$stamp"
}

works || make_venv
[ "$(cat "$stamp" 2>/dev/null)" = "$(fingerprint "$venv/bin/python")" ] || install_everything

# torch.compile, and Triton on a GPU, build C++ against Python; the driver of the browser tests
# needs libatomic.
packages=()
browser || packages+=(chromium fonts-liberation)
compiles || packages+=(g++ python3-dev)
drives_browser || packages+=(libatomic1)
if [ "${#packages[@]}" -gt 0 ] && may_install; then
    install_packages "${packages[@]}" || true # what is still missing is named below
fi
compiles ||
    say "no C++ compiler or no Python headers: torch.compile and Triton on a GPU do not work." \
        "On Debian: sudo apt-get install g++ python3-dev"
if ! browser; then
    missing="no browser (Chromium or Chrome) found. On Debian: sudo apt-get install chromium"
    [ "$wanted" = browser ] && stop "$missing" \
        "All tests but those in a browser: .venv/bin/python -m pytest -m 'not browser'"
    say "$missing" "Everything runs without it, but figures are not saved as PNG and SVG."
fi
drives_browser ||
    stop "the browser cannot be driven: .venv/bin/python -m playwright --version says why." \
        "On a small Debian: sudo apt-get install libatomic1"

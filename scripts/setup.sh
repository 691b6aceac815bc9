# Sourced by quickstart.sh and test.sh: a virtual environment in .venv with the
# given requirement files, installed again only when one of them has changed.
# Takes another Python through PYTHON=python3.12.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${VENV:-.venv}
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "Python 3.11 or newer is needed; $python is $("$python" --version)." >&2
  exit 2
}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"

install() {
  local file stamp
  for file in "$@"; do
    stamp="$venv/.installed-$(cat requirements*.txt pyproject.toml "$file" |
      sha256sum | cut -c1-16)-$file"
    [ -e "$stamp" ] && continue
    echo "installing $file into $venv ..."
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
      -r "$file"
    touch "$stamp"
  done
}

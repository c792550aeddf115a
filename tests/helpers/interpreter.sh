#!/bin/sh
# Prints an interpreter of the Python version $1: from the path, else pyenv's, else the name alone.
version=$1
for candidate in "$(command -v "python$version")" "$HOME"/.pyenv/versions/"$version".*/bin/python; do
    if [ -x "$candidate" ] && "$candidate" -c 'import venv' 2> /dev/null; then
        echo "$candidate"
        exit
    fi
done
echo "python$version"

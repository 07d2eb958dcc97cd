#!/bin/sh
# A driver of one question a call, over any command that checks a file: exit status 0 valid, 1 not.
#
#     sfp conformance run --once --validator conformance/drivers/validator.sh --level 1
#
# Without a line of JSON the error's code is not known, so files that must be refused come out as "wrong code".
[ "$1" = validate ] || exit 3
exec sfp verify "$2"

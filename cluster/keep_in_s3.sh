#!/usr/bin/env bash
# What a cluster must not lose, in a bucket: sweeps, runs and label sets, under way too. cluster.yaml runs it on the head.
#   keep_in_s3.sh restore    what the bucket has, on a machine that has nothing yet
#   keep_in_s3.sh once       what changed since the last time
#   keep_in_s3.sh forever    the same every five minutes, unless it runs already
# RAYDISTILL_BUCKET is the bucket's name, optionally with a prefix (my-bucket/raydistill); where it is empty nothing is
# done. Nothing is deleted in the bucket. The teacher cache is left out: it is large, and can be made again. So is
# MLflow's store: the same commands publish again from the folders. Files appear whole under their names, so a copy
# made at any moment is one that a command can go on from.
set -eu
bucket=${RAYDISTILL_BUCKET:-}
home=${RAYDISTILL_HOME:?}
[ -n "$bucket" ] || exit 0

copy() {
  aws s3 sync "$1" "$2" --only-show-errors --exclude 'cache/*' --exclude '*.making*' --exclude '*.lock' --exclude '*/.ray/*'
}

case ${1:-} in
  restore)
    [ -e "$home/.restored" ] && exit 0 # else `ray up` on a living head would put older files in the place of newer ones
    mkdir -p "$home"
    copy "s3://$bucket" "$home"
    touch "$home/.restored" ;;
  once) copy "$home" "s3://$bucket" ;;
  forever)
    exec 9>"/tmp/keep_in_s3.lock"
    flock -n 9 || exit 0
    while true; do
      copy "$home" "s3://$bucket" || echo "$(date): not everything was copied; tried again in five minutes" >&2
      sleep 300
    done ;;
  *) echo "usage: keep_in_s3.sh restore|once|forever" >&2; exit 2 ;;
esac

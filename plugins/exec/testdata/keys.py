#!/usr/bin/env python3
"""A plugin for a key server: PUT creates a key (done by Vault), DELETE revokes it, GET lists all keys."""
import http.client
import json
import os
import sys


def ask(method, path):
    server = http.client.HTTPConnection(os.environ["KEYS"], timeout=5)
    server.request(method, path, headers={"X-Admin": os.environ["KEYS_ADMIN"]})
    answer = server.getresponse()
    if answer.status not in (200, 404):
        raise SystemExit("the server answered %d" % answer.status)
    return json.loads(answer.read())


def no(kind, message):
    return {"error": {"kind": kind, "message": message}}


def load(q):
    if q["tool"]["settings"]:
        return no("malformed", "this plugin takes no settings")
    return {}


def prepare(q):
    scope = q["grant"]["args"].get("scope")
    if scope not in ("read", "write"):
        return no("denied", "the scope is read or write")
    return {"data": {"scope": scope, "name": q["grant"]["id"]}, "secret": ["name", "key"]}


def sever(q):
    for g in q["grants"]:
        ask("DELETE", "/keys/" + g["id"])
    return {}


def prove(q):
    alive = ask("GET", "/keys")
    return {"evidence": [{
        "grant": g["id"],
        "outcome": "alive" if g["id"] in alive else "dead",
        "check": "the server's list of keys",
        "answer": "listed" if g["id"] in alive else "not listed",
    } for g in q["grants"]]}


def find(q):
    return {"grants": ask("GET", "/keys")}


if sys.argv[1:] == ["lie"]:  # claim revocations without making them
    sever = lambda q: {}
    prove = lambda q: {"evidence": [{"grant": g["id"], "outcome": "dead", "check": "the server's list of keys",
                                     "answer": "not listed"} for g in q["grants"]]}

question = json.load(sys.stdin)
answer = {"load": load, "prepare": prepare, "sever": sever, "prove": prove, "find": find}[question["op"]](question)
json.dump({"version": 1, **answer}, sys.stdout)

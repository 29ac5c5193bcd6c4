package api

import _ "embed"

// OpenAPI is the OpenAPI 3.1 document of every endpoint, as JSON. An operation's x-listener
// says where it is: "agents", "operators" or "both". The document is made from the types of
// this package by its tests; the caller must not change the bytes.
//
//go:embed openapi.json
var OpenAPI []byte

package api

import _ "embed"

// OpenAPI is the OpenAPI 3.1 document of every endpoint, as JSON. An operation's x-listener names its listener:
// "agents", "operators" or "both". The tests of this package generate the document from the types. The caller must
// not change the bytes.
//
//go:embed openapi.json
var OpenAPI []byte

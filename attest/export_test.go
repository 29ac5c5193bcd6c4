package attest

// URINames opens the reading of a certificate's names to the fuzzer.
var URINames = uriNames

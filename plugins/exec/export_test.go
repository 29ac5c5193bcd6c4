package exec

// DecodePrepared reads an answer to prepare as [Backend.Prepare] does, for a tool at the path.
func DecodePrepared(raw []byte, path []string, write bool) (mint, secret []string, data map[string]string, err error) {
	var a prepared
	if err := decode(raw, &a); err != nil {
		return nil, nil, nil, err
	}
	if err := a.refused(Program{}); err != nil {
		return nil, nil, nil, err
	}
	if err := a.check(path, write); err != nil {
		return nil, nil, nil, err
	}
	data = map[string]string{}
	for name, value := range a.Data {
		data[name] = string(value)
	}
	return a.Path, a.Secret, data, nil
}

//go:build !linux

package exec

import (
	"errors"
	"io"
	"os"
	"path/filepath"
)

// seal copies a program into a new directory that only our user can read.
func seal(src io.Reader) (*image, error) {
	dir, err := os.MkdirTemp("", "pawl-plugin-")
	if err != nil {
		return nil, err
	}
	im := &image{path: filepath.Join(dir, "plugin"), close: func() { _ = os.RemoveAll(dir) }}
	f, err := os.OpenFile(im.path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o500)
	if err == nil {
		_, err = io.Copy(f, src)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		im.close()
		return nil, err
	}
	return im, nil
}

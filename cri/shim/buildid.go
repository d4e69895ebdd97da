package shim

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
)

// BuildID returns Go's build id of a program file: it differs when anything
// that went into the binary does. It reads the ELF note that Go's linker
// writes (name "Go", type 4); debug/elf would cost podd-shim half a megabyte.
func BuildID(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", fmt.Errorf("read program: %w", err)
	}
	defer f.Close()
	var head [64]byte // Elf64_Ehdr
	if _, err := f.ReadAt(head[:], 0); err != nil || string(head[:4]) != "\x7fELF" || head[4] != 2 {
		return "", fmt.Errorf("%s is not a 64-bit ELF program", path)
	}
	var order binary.ByteOrder = binary.LittleEndian
	if head[5] == 2 {
		order = binary.BigEndian
	}
	const (
		headerSize = 56 // Elf64_Phdr
		typeNote   = 4  // PT_NOTE
		maxNotes   = 64 << 10
	)
	offset, count := order.Uint64(head[32:]), int(order.Uint16(head[56:]))
	for i := range count {
		var ph [headerSize]byte
		if _, err := f.ReadAt(ph[:], int64(offset)+int64(i)*headerSize); err != nil {
			return "", fmt.Errorf("program headers of %s: %w", path, err)
		}
		size := order.Uint64(ph[32:])
		if order.Uint32(ph[:]) != typeNote || size > maxNotes {
			continue
		}
		notes := make([]byte, size)
		if _, err := f.ReadAt(notes, int64(order.Uint64(ph[8:]))); err != nil {
			return "", fmt.Errorf("notes of %s: %w", path, err)
		}
		if id, ok := goNote(notes, order); ok {
			return id, nil
		}
	}
	return "", fmt.Errorf("program %s has no Go build id", path)
}

// goNote looks for Go's among the notes of a segment: sizes of name and
// descriptor, type, name, descriptor, each padded to four bytes.
func goNote(notes []byte, order binary.ByteOrder) (string, bool) {
	pad := func(n uint32) uint64 { return (uint64(n) + 3) &^ 3 }
	for len(notes) >= 12 {
		nameSize, descSize, kind := order.Uint32(notes), order.Uint32(notes[4:]), order.Uint32(notes[8:])
		name := pad(nameSize)
		end := 12 + name + pad(descSize)
		if end > uint64(len(notes)) {
			return "", false
		}
		if kind == 4 && bytes.Equal(notes[12:12+nameSize], []byte("Go\x00\x00")) {
			return string(notes[12+name : 12+name+uint64(descSize)]), true
		}
		notes = notes[end:]
	}
	return "", false
}

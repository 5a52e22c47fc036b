package export

import (
	"encoding/binary"
	"fmt"
	"math"

	"chrysalis/verity/gpt"
)

// The removable media path of UEFI 2.10, section 3.5.1.1: what firmware starts
// from a disk that nobody has registered with it.
var uefiPath = [3]string{"EFI        ", "BOOT       ", "BOOTX64 EFI"}

// OVMF keeps its variables in a file of this name where a provider gives it no
// flash to keep them in (edk2's OvmfPkg/Library/NvVarsFileLib), on the first
// EFI system partition that lets it. With an empty file that is read-only it
// finds nothing to load, and edk2's FAT driver denies it to write.
const nvVars = "NVVARS     "

const (
	fatSector   = 512
	fatReserved = 32    // sectors before the first FAT, as everybody has it
	fatCopies   = 2     // FATs
	fatMinimum  = 65525 // clusters: with fewer the type would not be FAT32
	fatMargin   = 16    // "stay away from the limits by 16", same page

	clusterRoot  = 2 // the first that there is
	clusterEFI   = 3
	clusterBoot  = 4
	clusterFile  = 5 // and all behind it
	fatEnd       = 0x0fffffff
	fatMedia     = 0xf8
	fatDate1980  = 1<<5 | 1 // 1 January 1980, the earliest: no time is kept
	attrReadOnly = 0x01
	attrLabel    = 0x08
	attrFolder   = 0x10
	attrArchive  = 0x20
)

// A fat is the layout of a FAT32 file system that holds one file, at uefiPath,
// and an empty one that keeps firmware from writing.
// UEFI 2.10, section 13.3, wants FAT32 on an EFI system partition. The format
// is Microsoft's "FAT: General Overview of On-Disk Format", version 1.03.
//
// It is written here rather than by a program because it is little, and
// nothing in it depends on time or place.
type fat struct {
	fileSize int64
	cluster  int64 // bytes
	clusters int64
	table    int64 // bytes of one FAT
}

// newFAT lays out a file system for a file of so many bytes.
func newFAT(fileSize int64) (fat, error) {
	if fileSize <= 0 || fileSize > math.MaxUint32 {
		return fat{}, fmt.Errorf("a file of %d bytes does not fit on an EFI system partition, expected 1 to %d", fileSize, uint32(math.MaxUint32))
	}
	f := fat{fileSize: fileSize, cluster: fatSector}
	if fileSize > 256<<20 {
		f.cluster = 4096
	}
	f.clusters = max(fatMinimum+fatMargin, clusterFile-clusterRoot+f.fileClusters())
	f.table = roundUp((f.clusters+clusterRoot)*4, fatSector)
	return f, nil
}

func (f fat) fileClusters() int64 { return roundUp(f.fileSize, f.cluster) / f.cluster }

// at is where a cluster begins, in bytes.
func (f fat) at(cluster int64) int64 {
	return fatReserved*fatSector + fatCopies*f.table + (cluster-clusterRoot)*f.cluster
}

// fileOffset is where the file's bytes belong, in one piece.
func (f fat) fileOffset() int64 { return f.at(clusterFile) }

// size is that of the file system, rounded up to what a partition needs.
func (f fat) size() int64 { return roundUp(f.at(clusterRoot+f.clusters), gpt.Alignment) }

// head returns everything before the file's bytes, for a file system at an
// offset of the disk, in bytes.
func (f fat) head(offset int64, volumeID uint32) []byte {
	out := make([]byte, f.fileOffset())
	le := binary.LittleEndian

	// Page 9 and after: the boot sector, and its copy in sector 6.
	boot := out[:fatSector]
	copy(boot, "\xeb\x58\x90CHRYSALI")
	le.PutUint16(boot[11:], fatSector)
	boot[13] = byte(f.cluster / fatSector)
	le.PutUint16(boot[14:], fatReserved)
	boot[16] = fatCopies
	boot[21] = fatMedia
	le.PutUint16(boot[24:], 63) // sectors a track and heads, which nobody uses
	le.PutUint16(boot[26:], 255)
	le.PutUint32(boot[28:], uint32(offset/fatSector))
	le.PutUint32(boot[32:], uint32(f.at(clusterRoot+f.clusters)/fatSector))
	le.PutUint32(boot[36:], uint32(f.table/fatSector))
	le.PutUint32(boot[44:], clusterRoot)
	le.PutUint16(boot[48:], 1) // FSInfo's sector
	le.PutUint16(boot[50:], 6) // the copy's
	boot[64], boot[66] = 0x80, 0x29
	le.PutUint32(boot[67:], volumeID)
	copy(boot[71:], "CHRYSALIS  FAT32   ")
	boot[510], boot[511] = 0x55, 0xaa

	info := out[fatSector:][:fatSector]
	copy(info, "RRaA")
	copy(info[484:], "rrAa")
	used := clusterFile - clusterRoot + f.fileClusters()
	le.PutUint32(info[488:], uint32(f.clusters-used))
	le.PutUint32(info[492:], uint32(clusterRoot+used))
	info[510], info[511] = 0x55, 0xaa
	copy(out[6*fatSector:], out[:2*fatSector])

	// Both FATs: three folders of one cluster each, then the file's chain.
	table := out[fatReserved*fatSector:][:f.table]
	le.PutUint32(table, 0x0fffff00|fatMedia)
	le.PutUint32(table[4:], fatEnd) // cleanly unmounted, no errors
	for _, c := range []int64{clusterRoot, clusterEFI, clusterBoot} {
		le.PutUint32(table[4*c:], fatEnd)
	}
	last := clusterFile + f.fileClusters() - 1
	for c := int64(clusterFile); c < last; c++ {
		le.PutUint32(table[4*c:], uint32(c+1))
	}
	le.PutUint32(table[4*last:], fatEnd)
	copy(out[fatReserved*fatSector+f.table:], table)

	entry := func(folder int64, i int, name string, attributes byte, cluster uint32, size int64) {
		e := out[f.at(folder)+32*int64(i):][:32]
		copy(e, name)
		e[11] = attributes
		le.PutUint16(e[16:], fatDate1980) // created
		le.PutUint16(e[18:], fatDate1980) // read
		le.PutUint16(e[20:], uint16(cluster>>16))
		le.PutUint16(e[24:], fatDate1980) // written
		le.PutUint16(e[26:], uint16(cluster))
		le.PutUint32(e[28:], uint32(size))
	}
	entry(clusterRoot, 0, "CHRYSALIS  ", attrLabel, 0, 0)
	entry(clusterRoot, 1, uefiPath[0], attrFolder, clusterEFI, 0)
	entry(clusterRoot, 2, nvVars, attrReadOnly|attrArchive, 0, 0)
	entry(clusterEFI, 0, ".          ", attrFolder, clusterEFI, 0)
	entry(clusterEFI, 1, "..         ", attrFolder, 0, 0) // the root is 0 here
	entry(clusterEFI, 2, uefiPath[1], attrFolder, clusterBoot, 0)
	entry(clusterBoot, 0, ".          ", attrFolder, clusterBoot, 0)
	entry(clusterBoot, 1, "..         ", attrFolder, clusterEFI, 0)
	entry(clusterBoot, 2, uefiPath[2], attrReadOnly|attrArchive, clusterFile, f.fileSize)
	return out
}

func roundUp(n, unit int64) int64 { return (n + unit - 1) / unit * unit }

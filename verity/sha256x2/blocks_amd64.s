//go:build amd64 && !purego

#include "textflag.h"

// Two SHA-256 compressions, interleaved. SHA256RNDS2 does two rounds and needs the
// result of the one before it, some four cycles later, but the processor can begin
// another after half of that: lane B's goes there.
//
// FIPS 180-4 section 6.2.2; the instructions, and how they hold the eight working
// variables in two registers, are in Intel's Software Developer's Manual, volume 2B,
// SHA256RNDS2, SHA256MSG1 and SHA256MSG2. In both, names read from the highest
// 32 bits down.
//
//	X0        the words W+K of two rounds: SHA256RNDS2 takes them from nowhere else,
//	          so that the lanes have it in turn; renaming makes that free
//	X1, X2    lane A: variables ABEF and CDGH
//	X3 - X6   lane A: the last 16 words of the message schedule, X3 the oldest at first
//	X7, X8    lane B: variables
//	X9 - X12  lane B: words
//	X13, X14  what lane A and lane B have to put aside
//	X15       the order of bytes that turns big-endian words round

// VARIABLES turns a b c d, e f g h (lowest first, as in memory) into ABEF, CDGH: by
// way of CDAB and EFGH.
#define VARIABLES(abef, cdgh, t) \
	PSHUFD  $0xb1, abef, abef; \
	PSHUFD  $0x1b, cdgh, cdgh; \
	MOVO    abef, t; \
	PALIGNR $8, cdgh, abef; \
	PBLENDW $0xf0, t, cdgh

// MEMORY is the reverse of VARIABLES: by way of FEBA and DCHG.
#define MEMORY(abef, cdgh, t) \
	PSHUFD  $0x1b, abef, abef; \
	PSHUFD  $0xb1, cdgh, cdgh; \
	MOVO    abef, t; \
	PBLENDW $0xf0, cdgh, abef; \
	PALIGNR $8, t, cdgh

// ROUNDS does four rounds of both lanes, with the words wa and wb and the constants
// at k. The upper two words wait in X13 and X14 while the lower two are used.
#define ROUNDS(k, wa, wb) \
	MOVO        wa, X0; \
	PADDD       k(AX), X0; \
	PSHUFD      $0x0e, X0, X13; \
	SHA256RNDS2 X0, X1, X2; \
	MOVO        wb, X0; \
	PADDD       k(AX), X0; \
	PSHUFD      $0x0e, X0, X14; \
	SHA256RNDS2 X0, X7, X8; \
	MOVO        X13, X0; \
	SHA256RNDS2 X0, X2, X1; \
	MOVO        X14, X0; \
	SHA256RNDS2 X0, X8, X7

// SCHEDULE puts the next four words of each lane in place of its oldest, a0 and b0,
// of which ROUNDS has no more need:
// W[t] = s1(W[t-2]) + W[t-7] + s0(W[t-15]) + W[t-16]. SHA256MSG1 adds the second s
// and its neighbour, PALIGNR picks W[t-7] out of two registers, SHA256MSG2 adds the
// first s. ROUNDS wants them four times later, so that this runs in the shadow of
// the rounds.
#define SCHEDULE(a0, a1, a2, a3, b0, b1, b2, b3) \
	SHA256MSG1 a1, a0; \
	SHA256MSG1 b1, b0; \
	MOVO       a3, X13; \
	MOVO       b3, X14; \
	PALIGNR    $4, a2, X13; \
	PALIGNR    $4, b2, X14; \
	PADDD      X13, a0; \
	PADDD      X14, b0; \
	SHA256MSG2 a3, a0; \
	SHA256MSG2 b3, b0

// WORDS reads 16 bytes of each lane.
#define WORDS(at, wa, wb) \
	MOVOU  at(SI), wa; \
	MOVOU  at(DX), wb; \
	PSHUFB X15, wa; \
	PSHUFB X15, wb

// func blocks2(stateA, stateB *state, a, b *byte, n int)
TEXT ·blocks2(SB), NOSPLIT, $64-40
	MOVQ  stateA+0(FP), DI
	MOVQ  stateB+8(FP), R8
	MOVQ  a+16(FP), SI
	MOVQ  b+24(FP), DX
	MOVQ  n+32(FP), CX
	TESTQ CX, CX
	JLE   done

	MOVOU order<>(SB), X15
	LEAQ  constants<>(SB), AX
	MOVOU 0(DI), X1
	MOVOU 16(DI), X2
	MOVOU 0(R8), X7
	MOVOU 16(R8), X8
	VARIABLES(X1, X2, X13)
	VARIABLES(X7, X8, X14)

loop:
	// The variables before the rounds, to be added behind them.
	MOVOU X1, 0(SP)
	MOVOU X2, 16(SP)
	MOVOU X7, 32(SP)
	MOVOU X8, 48(SP)

	WORDS(0, X3, X9)
	WORDS(16, X4, X10)
	WORDS(32, X5, X11)
	WORDS(48, X6, X12)
	ROUNDS(0, X3, X9)
	SCHEDULE(X3, X4, X5, X6, X9, X10, X11, X12)
	ROUNDS(16, X4, X10)
	SCHEDULE(X4, X5, X6, X3, X10, X11, X12, X9)
	ROUNDS(32, X5, X11)
	SCHEDULE(X5, X6, X3, X4, X11, X12, X9, X10)
	ROUNDS(48, X6, X12)
	SCHEDULE(X6, X3, X4, X5, X12, X9, X10, X11)
	ROUNDS(64, X3, X9)
	SCHEDULE(X3, X4, X5, X6, X9, X10, X11, X12)
	ROUNDS(80, X4, X10)
	SCHEDULE(X4, X5, X6, X3, X10, X11, X12, X9)
	ROUNDS(96, X5, X11)
	SCHEDULE(X5, X6, X3, X4, X11, X12, X9, X10)
	ROUNDS(112, X6, X12)
	SCHEDULE(X6, X3, X4, X5, X12, X9, X10, X11)
	ROUNDS(128, X3, X9)
	SCHEDULE(X3, X4, X5, X6, X9, X10, X11, X12)
	ROUNDS(144, X4, X10)
	SCHEDULE(X4, X5, X6, X3, X10, X11, X12, X9)
	ROUNDS(160, X5, X11)
	SCHEDULE(X5, X6, X3, X4, X11, X12, X9, X10)
	ROUNDS(176, X6, X12)
	SCHEDULE(X6, X3, X4, X5, X12, X9, X10, X11)
	ROUNDS(192, X3, X9)
	ROUNDS(208, X4, X10)
	ROUNDS(224, X5, X11)
	ROUNDS(240, X6, X12)

	MOVOU 0(SP), X13
	MOVOU 32(SP), X14
	PADDD X13, X1
	PADDD X14, X7
	MOVOU 16(SP), X13
	MOVOU 48(SP), X14
	PADDD X13, X2
	PADDD X14, X8

	ADDQ $64, SI
	ADDQ $64, DX
	DECQ CX
	JNZ  loop

	MEMORY(X1, X2, X13)
	MEMORY(X7, X8, X14)
	MOVOU X1, 0(DI)
	MOVOU X2, 16(DI)
	MOVOU X7, 0(R8)
	MOVOU X8, 16(R8)

done:
	RET

// func cpuid(leaf, subleaf uint32) (eax, ebx, ecx, edx uint32)
TEXT ·cpuid(SB), NOSPLIT, $0-24
	MOVL leaf+0(FP), AX
	MOVL subleaf+4(FP), CX
	CPUID
	MOVL AX, eax+8(FP)
	MOVL BX, ebx+12(FP)
	MOVL CX, ecx+16(FP)
	MOVL DX, edx+20(FP)
	RET

DATA order<>+0(SB)/8, $0x0405060700010203
DATA order<>+8(SB)/8, $0x0c0d0e0f08090a0b
GLOBL order<>(SB), RODATA|NOPTR, $16

// K of FIPS 180-4 section 4.2.2. PADDD wants it aligned to 16 bytes: the linker
// aligns data of this length to 32.
DATA constants<>+0(SB)/4, $0x428a2f98
DATA constants<>+4(SB)/4, $0x71374491
DATA constants<>+8(SB)/4, $0xb5c0fbcf
DATA constants<>+12(SB)/4, $0xe9b5dba5
DATA constants<>+16(SB)/4, $0x3956c25b
DATA constants<>+20(SB)/4, $0x59f111f1
DATA constants<>+24(SB)/4, $0x923f82a4
DATA constants<>+28(SB)/4, $0xab1c5ed5
DATA constants<>+32(SB)/4, $0xd807aa98
DATA constants<>+36(SB)/4, $0x12835b01
DATA constants<>+40(SB)/4, $0x243185be
DATA constants<>+44(SB)/4, $0x550c7dc3
DATA constants<>+48(SB)/4, $0x72be5d74
DATA constants<>+52(SB)/4, $0x80deb1fe
DATA constants<>+56(SB)/4, $0x9bdc06a7
DATA constants<>+60(SB)/4, $0xc19bf174
DATA constants<>+64(SB)/4, $0xe49b69c1
DATA constants<>+68(SB)/4, $0xefbe4786
DATA constants<>+72(SB)/4, $0x0fc19dc6
DATA constants<>+76(SB)/4, $0x240ca1cc
DATA constants<>+80(SB)/4, $0x2de92c6f
DATA constants<>+84(SB)/4, $0x4a7484aa
DATA constants<>+88(SB)/4, $0x5cb0a9dc
DATA constants<>+92(SB)/4, $0x76f988da
DATA constants<>+96(SB)/4, $0x983e5152
DATA constants<>+100(SB)/4, $0xa831c66d
DATA constants<>+104(SB)/4, $0xb00327c8
DATA constants<>+108(SB)/4, $0xbf597fc7
DATA constants<>+112(SB)/4, $0xc6e00bf3
DATA constants<>+116(SB)/4, $0xd5a79147
DATA constants<>+120(SB)/4, $0x06ca6351
DATA constants<>+124(SB)/4, $0x14292967
DATA constants<>+128(SB)/4, $0x27b70a85
DATA constants<>+132(SB)/4, $0x2e1b2138
DATA constants<>+136(SB)/4, $0x4d2c6dfc
DATA constants<>+140(SB)/4, $0x53380d13
DATA constants<>+144(SB)/4, $0x650a7354
DATA constants<>+148(SB)/4, $0x766a0abb
DATA constants<>+152(SB)/4, $0x81c2c92e
DATA constants<>+156(SB)/4, $0x92722c85
DATA constants<>+160(SB)/4, $0xa2bfe8a1
DATA constants<>+164(SB)/4, $0xa81a664b
DATA constants<>+168(SB)/4, $0xc24b8b70
DATA constants<>+172(SB)/4, $0xc76c51a3
DATA constants<>+176(SB)/4, $0xd192e819
DATA constants<>+180(SB)/4, $0xd6990624
DATA constants<>+184(SB)/4, $0xf40e3585
DATA constants<>+188(SB)/4, $0x106aa070
DATA constants<>+192(SB)/4, $0x19a4c116
DATA constants<>+196(SB)/4, $0x1e376c08
DATA constants<>+200(SB)/4, $0x2748774c
DATA constants<>+204(SB)/4, $0x34b0bcb5
DATA constants<>+208(SB)/4, $0x391c0cb3
DATA constants<>+212(SB)/4, $0x4ed8aa4a
DATA constants<>+216(SB)/4, $0x5b9cca4f
DATA constants<>+220(SB)/4, $0x682e6ff3
DATA constants<>+224(SB)/4, $0x748f82ee
DATA constants<>+228(SB)/4, $0x78a5636f
DATA constants<>+232(SB)/4, $0x84c87814
DATA constants<>+236(SB)/4, $0x8cc70208
DATA constants<>+240(SB)/4, $0x90befffa
DATA constants<>+244(SB)/4, $0xa4506ceb
DATA constants<>+248(SB)/4, $0xbef9a3f7
DATA constants<>+252(SB)/4, $0xc67178f2
GLOBL constants<>(SB), RODATA|NOPTR, $256

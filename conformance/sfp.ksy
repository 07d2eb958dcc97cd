meta:
  id: sfp
  title: SFP, a container for pruned neural networks
  file-extension: sfp
  license: Apache-2.0
  ks-version: '0.10'
  endian: le
doc: |
  The container of SPEC.md: the preamble, the directory, and the fields at fixed offsets in chunks. Use it for hex
  viewers, or as a start for a reader in another language. It does not parse the parts whose layout depends on the
  directory (code tables, planes, levels), and makes none of the checks that SPEC.md requires of a reader.
doc-ref: SPEC.md
seq:
  - id: preamble
    type: preamble
  - id: chunks
    size: preamble.directory_offset - 64
    doc: |
      All chunks, one after another (R-LAY-001): tensors in the order of the directory; of each tensor first its
      vector chunk. The chunk records of the entries contain the lengths, see `chunk_records`.
  - id: directory
    type: value
    size: preamble.directory_length
types:
  preamble:
    doc: SPEC.md chapter 4
    seq:
      - id: magic
        contents: [0x89, 'SFP', 0x0d, 0x0a, 0x1a, 0x0a]
      - id: major
        type: u2
      - id: minor
        type: u2
      - id: reserved
        size: 4
      - id: directory_offset
        type: u8
      - id: directory_length
        type: u8
      - id: file_length
        type: u8
      - id: directory_checksum
        type: u4
        doc: CRC-32 of the directory
      - id: more_reserved
        size: 16
      - id: checksum
        type: u4
        doc: CRC-32 of bytes 0 to 59
  value:
    doc: A value in the subset of MessagePack of SPEC.md chapter 6; its numbers are big-endian.
    meta:
      endian: be
    seq:
      - id: first
        type: u1
      - id: size_1
        type: u1
        if: first == 0xcc or first == 0xd9 or first == 0xc4
      - id: size_2
        type: u2
        if: first == 0xcd or first == 0xda or first == 0xc5 or first == 0xdc or first == 0xde
      - id: size_4
        type: u4
        if: first == 0xce or first == 0xdb or first == 0xc6 or first == 0xdd or first == 0xdf
      - id: size_8
        type: u8
        if: first == 0xcf
      - id: text
        type: str
        encoding: UTF-8
        size: number
        if: is_text
      - id: binary
        size: number
        if: is_binary
      - id: elements
        type: value
        repeat: expr
        repeat-expr: number
        if: is_array
      - id: pairs
        type: pair
        repeat: expr
        repeat-expr: number
        if: is_map
    instances:
      is_text:
        value: (first & 0xe0) == 0xa0 or (first >= 0xd9 and first <= 0xdb)
      is_binary:
        value: first >= 0xc4 and first <= 0xc6
      is_array:
        value: (first & 0xf0) == 0x90 or first == 0xdc or first == 0xdd
      is_map:
        value: (first & 0xf0) == 0x80 or first == 0xde or first == 0xdf
      is_integer:
        value: first < 0x80 or (first >= 0xcc and first <= 0xcf)
      number:
        doc: the value of an integer, or the number of bytes, elements or pairs that follow
        value: >-
          first < 0x80 ? first :
          (first & 0xf0) == 0x80 or (first & 0xf0) == 0x90 ? (first & 0x0f) :
          (first & 0xe0) == 0xa0 ? (first & 0x1f) :
          first == 0xcc or first == 0xd9 or first == 0xc4 ? size_1 :
          first == 0xcd or first == 0xda or first == 0xc5 or first == 0xdc or first == 0xde ? size_2 :
          first == 0xcf ? size_8 : size_4
  pair:
    seq:
      - id: key
        type: value
      - id: value
        type: value
  chunk_records:
    doc: The binaries `chunks` and `vectors` of an entry (SPEC.md chapter 7).
    seq:
      - id: records
        type: chunk_record
        repeat: eos
  chunk_record:
    seq:
      - id: length
        type: u4
      - id: checksum
        type: u4
        doc: CRC-32 of the chunk
  delta_checksums:
    doc: The binary `checksums` of the map `delta` (SPEC.md 28.1).
    seq:
      - id: tensors
        type: delta_checksum
        repeat: eos
  delta_checksum:
    seq:
      - id: base
        type: u4
        doc: CRC-32 of the tensor in the base
      - id: result
        type: u4
        doc: CRC-32 of the tensor in the result
  chunk_header:
    doc: |
      The header of a chunk of a tensor with coding `fingerprint` (SPEC.md 15.2). The entry determines the number
      of quantities.
    params:
      - id: count
        type: u4
    seq:
      - id: quantities
        type: quantity
        repeat: expr
        repeat-expr: count
  quantity:
    seq:
      - id: minimum
        type: u4
      - id: width
        type: u1
        doc: number of bits of each segment's field; 0 if all segments have the minimum
      - id: reserved
        size: 3
